// The passes over the elements of an item.
#pragma once

#include "cuda/access.cuh"
#include "cuda/sums.cuh"

namespace layerlr {

/// What is done to the elements of an item.
enum class Pass : int32_t {
  measure,                 // gradient rules, first: nothing changes
  advance,                 // update rules, first: the state moves on
  apply,                   // update rules, second: w <- a*w + b*u, u formed again from the state
  advance_apply_measured,  // gradient rules, second: both, with grad*g
  advance_apply            // no rule: both
};
LAYERLR_HD constexpr bool advances(Pass pass) {
  return pass != Pass::measure && pass != Pass::apply;
}
LAYERLR_HD constexpr bool applies(Pass pass) { return pass >= Pass::apply; }
LAYERLR_HD constexpr bool sums_up(Pass pass) {
  return pass != Pass::apply && pass != Pass::advance_apply;
}

/// The numbers of a layer that its elements need.
template <class T>
struct Factors {
  T grad, a, b;
};

/// The passes over an item: full tiles of aligned arrays have a loop for each pass, without
/// questions; whatever else there is goes through one loop, which asks.
template <template <class> class D, class P, bool coded>
struct Elements : Access<D, P, coded> {
  using Base = Access<D, P, coded>;
  using T = typename Base::T;
  using Base::Access;
  using Base::at, Base::d, Base::how, Base::skips, Base::states;
  static constexpr int stride = 4 * workers;
  static constexpr bool may_be_codes = coded && takes_codes<D>;

  // -- which elements --

  /// Full tiles from element e on. Returns where they end.
  LAYERLR_DEVICE int tiles(Pass pass, const Factors<T>& by, int e, LayerStats& sums) const {
    if (!at.aligned || (at.codes && at.block != code_block)) return e;
    if constexpr (may_be_codes) {
      if (at.codes && pass != Pass::measure) return tiles_with(Known<true>(), pass, by, e, sums);
    }
    return tiles_with(Known<false>(), pass, by, e, sums);
  }
  template <class Codes>
  LAYERLR_DEVICE int tiles_with(Codes codes, Pass pass, const Factors<T>& by, int e,
                                LayerStats& sums) const {
    switch (pass) {
      case Pass::measure:
        if constexpr (Codes::value) return e;
        return tiles_of<Pass::measure>(Known<false>(), by, e, sums);
      case Pass::advance:
        return tiles_of<Pass::advance>(codes, by, e, sums);
      case Pass::apply:
        return tiles_of<Pass::apply>(codes, by, e, sums);
      case Pass::advance_apply_measured:
        return tiles_of<Pass::advance_apply_measured>(codes, by, e, sums);
      default:
        return tiles_of<Pass::advance_apply>(codes, by, e, sums);
    }
  }
  template <Pass pass, class Codes>
  LAYERLR_DEVICE int tiles_of(Codes codes, const Factors<T>& by, int e, LayerStats& sums) const {
    // Vectors of four that a worker has in hand, as registers allow; between them lie those of the
    // other workers. What lies beside 16-bit weights takes registers, a gradient that u needs too.
    constexpr int held = states + (Base::coded_weights && D<T>::needs_grad);
    constexpr int in_hand = Codes::value || held > (coded ? 1 : 2) ? 1 : 2;
    constexpr int tile = in_hand * stride;
    const int end = at.count - tile + static_cast<int>(threadIdx.x) * 4;
#pragma unroll 1
    for (; e <= end; e += tile) {
      visit<in_hand>(Known<pass>(), codes, Known<true>(), by, e, 4, this->block_of(e), sums);
    }
    return e;
  }

  /// The vector at element e, whichever it is.
  LAYERLR_DEVICE void one(Pass pass, const Factors<T>& by, int e, LayerStats& sums) const {
    if constexpr (may_be_codes) {
      one_as(at.codes, pass, by, e, sums);
    } else {
      one_as(Known<false>(), pass, by, e, sums);
    }
  }
  template <class Codes>
  LAYERLR_DEVICE void one_as(Codes codes, Pass pass, const Factors<T>& by, int e,
                             LayerStats& sums) const {
    const int block = this->block_of(e), within = e - block * code_block;
    // 16 threads have a block, which may not fill them
    const int place = codes ? block * at.block + within : e;
    const int left = codes ? at.block - within : at.count - e, n = left < 4 ? left : 4;
    visit<1>(pass, codes, at.aligned && n == 4, by, place, n, block, sums);
  }

  // -- what is done to them --

  /// One worker's `many` vectors from element e on, each of n elements. What kind of pass it is,
  /// whether states are codes, and whether vectors are whole is known to the compiler, or is asked.
  template <int many, class Kind, class Codes, class Whole>
  LAYERLR_DEVICE void visit(Kind kind, Codes codes, Whole whole, const Factors<T>& by, int e, int n,
                            int block, LayerStats& sums) const {
    const Pass pass = kind;
    const bool steps = pass != Pass::measure, both = advances(pass) && applies(pass);
    const bool weights = steps || how.weights, raw = !steps && how.raw;
    using Read = typename Base::template Read<Codes>;
    const Use use = pass == Pass::advance_apply ? once : applies(pass) ? last : again;
    T w[many][4] = {}, g[many][4] = {}, s[many][states + 1][4], stored[many][4];
#pragma unroll
    for (int v = 0; v < many; ++v) {
      const int from = e + v * stride;
      if (weights) this->load_typed(use, whole, array_w, from, n, w[v]);
      if (pass != Pass::apply || D<T>::needs_grad) {
        const bool ends = pass == Pass::advance && !D<T>::needs_grad;
        this->load_gradient(ends ? last : use, whole, from, n, g[v]);
      }
      if (steps) this->load_states(use, codes, whole, from, n, block, s[v]);
    }
    // Asked for when everything else is on its way: a question about weights waits for them.
    if constexpr (Base::coded_weights) {
#pragma unroll
      for (int v = 0; v < many; ++v) {
        if (weights) this->hold_weights(use, whole, e + v * stride, n, w[v], stored[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < many; ++v) {
      T moved[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // asked without branches
        const bool moves = (pass != Pass::advance) | !skips | is_finite(g[v][i]);
        if (!raw) g[v][i] = this->decayed(g[v][i], w[v][i]);
        if (pass == Pass::advance_apply_measured) g[v][i] = g[v][i] * by.grad;
        if (advances(pass)) {
          T old[states + 1], now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) old[k] = s[v][k][i];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = Read{old}[k];
          d.advance(g[v][i], now);
#pragma unroll
          for (int k = 0; k < states; ++k) s[v][k][i] = moves ? now[k] : Read{old}[k];
        }
      }
      if (advances(pass)) this->store_states(use, codes, whole, e + v * stride, n, block, s[v]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T u = 0;
        if (steps) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          u = i < n ? d.direction(g[v][i], Read{now}) : T(0);
        }
        if (sums_up(pass)) {
          if (weights) add(sums.ww, w[v][i], w[v][i]);
          if (!both) add(sums.gg, g[v][i], g[v][i]);
          if (steps) {
            add(sums.uu, u, u);
            add(sums.wu, w[v][i], u);
          }
        }
        if (applies(pass)) moved[i] = add_step(w[v][i] * by.a, u * by.b);
      }
      if (applies(pass)) {
        this->store_weights(use, whole, e + v * stride, n, w[v], stored[v], moved);
      }
    }
  }
};

}  // namespace layerlr
