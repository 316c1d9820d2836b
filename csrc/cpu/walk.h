// The order in which kernels visit the elements of a piece, and how they reach them.
#pragma once

#include <type_traits>

#include "codes.h"
#include "cpu/memory.h"

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

/// Visit a piece in runs of packs, in several places at once: one stream of reads after another
/// leaves memory waiting (decision 3 in csrc/README.md). Body: its access, first element, how many
/// packs, and the number of its block.
constexpr int places = 2;

template <int step, int packs, class Body>
inline void walk(int64_t n, int64_t block, Body body) {
  constexpr int run = packs * step;
  constexpr std::integral_constant<int, packs> many;
  if constexpr (packs > 1) {
    if (block < run) {
      for (int64_t i = 0, b = 0; i < n; i += block) body(SmallBlock{block}, i, many, b++);
      return;
    }
  }
  const int64_t part = n / (places * run) * run;
  for (int64_t i = 0; i < part; i += run) {
    for (int k = 0; k < places; ++k) body(Full{}, k * part + i, many, (k * part + i) / run);
  }
  int64_t i = places * part;
  for (; i + run <= n; i += run) body(Full{}, i, many, i / run);
  if (i == n) return;
  if constexpr (packs > 1) {
    body(SmallBlock{n - i}, i, many, i / run);
  } else {
    body(Tail{n - i}, i, many, 0);
  }
}

}  // namespace
}  // namespace layerlr
