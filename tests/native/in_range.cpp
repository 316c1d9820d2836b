// Root and quotient by a guess (csrc/core.h) are those of the processor, to the bit: of every
// mantissa, and of every exponent that the scales of codes meet with some of the mantissas. The
// guesses are rounded ones. A GPU's are not, but from them its compiler goes the same way
// (tests/gpu/test_cuda_build.py).
#include <cstdio>
#include <initializer_list>

#include "codes.h"

using namespace layerlr;

namespace {

long wrong = 0;

float number(int exponent, uint32_t mantissa) {
  return bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23 | mantissa);
}

void try_root(float x) {
  wrong += root_by(static_cast<float>(1 / std::sqrt(static_cast<double>(x))), x) != std::sqrt(x);
}
void try_quotients(float y) {
  const float guess = static_cast<float>(1 / static_cast<double>(y));
  for (const float x : {16129 * 0x1p-16f, 4228250625.f * 0x1p-16f}) {
    wrong += quotient_by(guess, x, y) != x / y;
  }
}

}  // namespace

int main() {
  for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    for (const int exponent : {-94, 0, 125}) try_root(number(exponent, mantissa));
    for (const int exponent : {-110, 0, 109}) try_quotients(number(exponent, mantissa));
  }
  for (int exponent = -94; exponent < 126; ++exponent) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 1009) {
      try_root(number(exponent, mantissa));
      try_quotients(number(exponent - 16, mantissa));
    }
  }
  std::printf("%ld\n", wrong);
  return wrong != 0;
}
