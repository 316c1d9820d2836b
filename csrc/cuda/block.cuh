// A block: what its warps share, and its workers, who do what is to be done to elements. A warp
// that takes tickets for them is in dispatcher.cuh, one that adds their sums in adder.cuh.
#pragma once

#include "cuda/elements.cuh"

namespace layerlr {

enum What : int32_t { nothing, measures, applies, ends };

/// An item, ready to be worked on.
struct Work {
  Arrays at;
  Gradient how;
  DType dtype;
  What what;
  bool waits;   // its verdict was not there yet
  bool second;  // the pass
  bool sums;    // there are sums to add, of nothing perhaps
  bool codes;   // its states are codes
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

/// Dtypes that a kernel knows. with_type calls body(P(), whether arrays may have codecs, whether
/// the states are codes).
template <class P, bool may_be_coded>
struct Only {
  static constexpr bool any = false, coded = may_be_coded;
  template <class Body>
  LAYERLR_DEVICE static void with_type(DType, bool codes, Body body) {
    if constexpr (may_be_coded) {
      if (codes) return body(P(), std::true_type(), std::true_type());
    }
    body(P(), std::bool_constant<may_be_coded>(), std::false_type());
  }
};
struct AnyDtype {
  static constexpr bool any = true, coded = true;
  template <class Body>
  LAYERLR_DEVICE static void with_type(DType dtype, bool codes, Body body) {
    switch (dtype) {
      case DType::f32:
        return Only<float, true>::with_type(dtype, codes, body);
      case DType::f64:
        return Only<double, false>::with_type(dtype, codes, body);
      case DType::bf16:
        return Only<BFloat16, true>::with_type(dtype, codes, body);
      case DType::f16:
        return Only<Float16, true>::with_type(dtype, codes, body);
    }
  }
};

/// What a worker does, item after item. The next one is prepared, and the sums of the last one are
/// added, by the two other warps in the meantime.
template <template <class> class D, class F, Order order>
LAYERLR_DEVICE void work_on_items(Shared<D>& shared) {
  for (int k = 0;; ++k) {
    const Work& now = shared.work[k & 1];
    meet();  // item k is ready
    if (now.waits) meet();
    if (now.what == ends) return;
    if (now.what == nothing) continue;
    LayerStats sums;
    F::with_type(now.dtype, now.codes, [&](auto p, auto coded, auto codes) {
      using P = decltype(p);
      using T = typename Wide<P>::type;
      const Arrays at = now.at;
      const Gradient how = now.how;
      const D<T> d = *reinterpret_cast<const D<T>*>(shared.scalars[now.scalars].room);
      const Elements<D, P, decltype(coded)::value, decltype(codes)::value, !F::any> elements(at, d,
                                                                                             how);
      const T grad = T(now.grad), a = T(now.a), b = T(now.b);
      if constexpr (order == unmeasured) {
        elements.template advance_apply<false>(grad, a, b);
      } else if constexpr (order == gradient_rule) {
        sums = now.what == measures ? elements.measure()
                                    : elements.template advance_apply<true>(grad, a, b);
      } else if (now.what == measures) {
        sums = elements.advance();
      } else {
        elements.apply(a, b);
      }
    });
    if (order != unmeasured && now.sums) {
      reinterpret_cast<LayerStats&>(shared.partials[k & 1].of[threadIdx.x]) = sums;
    }
  }
}

}  // namespace layerlr
