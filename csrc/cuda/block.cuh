// A block: what its warps share, and its workers, who do what is to be done to elements. A warp
// that takes tickets for them is in dispatcher.cuh, one that adds their sums in adder.cuh.
#pragma once

#include "cuda/elements.cuh"

namespace layerlr {

enum What : int32_t { nothing, works, ends };

/// An item, ready to be worked on.
struct Work {
  Arrays at;
  Gradient how;
  What what;
  Pass pass;
  bool waits;   // its verdict was not there yet
  bool second;  // the pass
  bool sums;    // there are sums to add, of nothing perhaps
  int scalars;  // which of the block's two
  int layer, slot;
  double grad, a, b;
};

/// The scalars of a direction for step t, in the type of the arithmetic.
template <template <class> class D>
struct Scalars {
  double t;
  bool wide;
  alignas(D<double>) char room[sizeof(D<double>)];
};

/// What the threads of a block share. Of each pair one is in use while the other is made ready.
template <template <class> class D>
struct Shared {
  Partials partials[2];
  Work work[2];
  Scalars<D> scalars[2];
  bool last;  // this block was the last to end
};

/// The barrier of all threads of the block.
LAYERLR_DEVICE void meet() { __syncthreads(); }

/// What kernels know. Those for float32 and bfloat16 have loops over full tiles, and `may_be_coded`
/// with codecs; the one for every dtype has not.
template <bool may_be_coded>
struct Floats {
  static constexpr bool any = false, coded = may_be_coded;
  typedef OneOf<float, BFloat16> Narrow;
};
struct AnyDtype {
  static constexpr bool any = true, coded = true;
  typedef OneOf<float, BFloat16, Float16> Narrow;
};

/// What a worker does to an item's elements, of parameter type P or one of those.
template <template <class> class D, class P, bool coded>
struct Worker {
  using T = typename Wide<P>::type;
  using Here = Elements<D, P, coded>;

  LAYERLR_DEVICE static const D<T>& scalars(const Shared<D>& shared, const Work& now) {
    return *reinterpret_cast<const D<T>*>(shared.scalars[now.scalars].room);
  }
  LAYERLR_DEVICE static Factors<T> factors(const Work& now) {
    return {T(now.grad), T(now.a), T(now.b)};
  }
  /// Full tiles; everything that they need is in registers. Returns where they end.
  LAYERLR_DEVICE static int tiles(const Shared<D>& shared, const Work& now, int e,
                                  LayerStats& sums) {
    const Arrays at = now.at;
    const Gradient how = now.how;
    const D<T> d = scalars(shared, now);
    return Here(at, d, how).tiles(now.pass, factors(now), e, sums);
  }
  /// One vector after the other; what they need is read again for each.
  LAYERLR_DEVICE static void rest(const Shared<D>& shared, const Work& now, int e,
                                  LayerStats& sums) {
#pragma unroll 1
    for (; e < now.at.count; e += 4 * workers) {
      device::forget();
      Here(now.at, scalars(shared, now), now.how).one(now.pass, factors(now), e, sums);
    }
  }
};

/// What the workers do, item after item. The next one is prepared, and the sums of the last one are
/// added, by the two other warps in the meantime.
template <template <class> class D, class F>
LAYERLR_DEVICE void work_on_items(Shared<D>& shared) {
  for (int k = 0;; ++k) {
    const Work& now = shared.work[k & 1];
    meet();  // item k is ready
    if (now.waits) meet();
    if (now.what == ends) return;
    if (now.what == nothing) continue;
    LayerStats sums;
    int e = static_cast<int>(threadIdx.x) * 4;
    if constexpr (!F::any) {
      with_type(typename F::Narrow(), now.at.dtype,
                [&](auto p) { e = Worker<D, decltype(p), F::coded>::tiles(shared, now, e, sums); });
    }
    if constexpr (F::any) {
      if (now.at.dtype == DType::f64) {
        Worker<D, double, false>::rest(shared, now, e, sums);
      } else {
        Worker<D, typename F::Narrow, true>::rest(shared, now, e, sums);
      }
    } else {
      Worker<D, typename F::Narrow, F::coded>::rest(shared, now, e, sums);
    }
    if (now.sums) reinterpret_cast<LayerStats&>(shared.partials[k & 1].of[threadIdx.x]) = sums;
  }
}

}  // namespace layerlr
