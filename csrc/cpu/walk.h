// The order in which kernels visit the elements of a piece, and how they reach them.
#pragma once

#include <type_traits>

#include "codes.h"
#include "cpu/memory.h"
#include "row.h"

namespace layerlr {
namespace {

/// Elements ahead that are asked for: about 1 KB (decision 2 in csrc/README.md).
template <class P>
constexpr int ahead = 1024 / sizeof(P);

/// A full pack of elements.
struct Full {
  template <class P>
  auto load(const P* p) const {
    __builtin_prefetch(p + ahead<P>);
    return layerlr::load(p);
  }
  template <class P, class V>
  void store(P* p, V x) const {
    layerlr::store(p, x);
  }
  template <class V>
  V mask(V x) const {
    return x;
  }
  void store_code(uint8_t* p, Pack<float> c) const { layerlr::store_code(p, c); }
  Full pack(int) const { return {}; }
};

/// The first n elements of a pack.
struct Tail {
  int64_t n;
  template <class P>
  auto load(const P* p) const {
    return load_part(p, n);
  }
  template <class P, class V>
  void store(P* p, V x) const {
    store_part(p, x, n);
  }
  template <class V>
  V mask(V x) const {
    return first_lanes(x, n);
  }
  void store_code(uint8_t* p, Pack<float> c) const {
    uint8_t room[Pack<float>::size];
    layerlr::store_code(room, c);
    std::memcpy(p, room, n);
  }
  Tail pack(int) const { return *this; }
};

/// A block of codes that is smaller than most.
struct SmallBlock {
  int64_t n;
  Tail pack(int p) const {
    const int64_t size = Pack<float>::size, rest = n - p * size;
    return {rest < 0 ? 0 : rest < size ? rest : size};
  }
};

/// How numbers of type P are read and written, and what is lost by it.
template <class P>
struct Numbers {
  DType dtype;

  template <class IO>
  auto load(IO io, const void* from, int64_t i) const {
    return io.load(static_cast<const P*>(from) + i);
  }
  template <class IO, class V>
  void store(IO io, void* to, int64_t i, V x) const {
    io.store(static_cast<P*>(to) + i, x);
  }
};

/// float32, bfloat16 or float16, by what they are.
struct AnyType {};
template <>
struct Arithmetic<AnyType> {
  typedef float type;
};
template <>
struct Numbers<AnyType> {
  DType dtype;

  template <class IO>
  Pack<float> load(IO io, const void* from, int64_t i) const {
    if (dtype == DType::f32) return io.load(static_cast<const float*>(from) + i);
    if (dtype == DType::bf16) return io.load(static_cast<const BFloat16*>(from) + i);
    return io.load(static_cast<const Float16*>(from) + i);
  }
  template <class IO>
  void store(IO io, void* to, int64_t i, Pack<float> x) const {
    if (dtype == DType::f32) return io.store(static_cast<float*>(to) + i, x);
    if (dtype == DType::bf16) return io.store(static_cast<BFloat16*>(to) + i, x);
    io.store(static_cast<Float16*>(to) + i, x);
  }
  /// What a load finds where x was stored.
  Pack<float> nearest(Pack<float> x) const {
    if (dtype == DType::f32) return x;
    return dtype == DType::bf16 ? layerlr::nearest<BFloat16>(x) : layerlr::nearest<Float16>(x);
  }
};

/// Visit a piece in runs of packs, in several places at once: one stream of reads after another
/// leaves memory waiting (decision 3 in csrc/README.md). Body: its access, first element, how many
/// packs, and the number of its block.
constexpr int places = 2;

template <int step, int packs, class Body>
LAYERLR_HD void walk(int64_t n, int64_t block, Body body) {
  constexpr int run = packs * step;
  constexpr std::integral_constant<int, packs> many;
  const int64_t part = n / (places * run) * run;
  // with codes the body is large: it is written out twice, not four times
  if constexpr (packs > 1) {
    const int64_t runs = block < run ? 0 : n / run;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t i = r * run < places * part ? r % places * part + r / places * run : r * run;
      body(Full{}, i, many, i / run);
    }
    for (int64_t b = runs; b * block < n; ++b) {
      const int64_t rest = n - b * block;
      body(SmallBlock{rest < block ? rest : block}, b * block, many, b);
    }
  } else {
    for (int64_t i = 0; i < part; i += run) {
      for (int k = 0; k < places; ++k) body(Full{}, k * part + i, many, 0);
    }
    int64_t i = places * part;
    for (; i + run <= n; i += run) body(Full{}, i, many, 0);
    if (i < n) body(Tail{n - i}, i, many, 0);
  }
}

}  // namespace
}  // namespace layerlr
