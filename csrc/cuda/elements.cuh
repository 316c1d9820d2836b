// The two passes over the elements of an item.
#pragma once

#include "cuda/access.cuh"
#include "cuda/sums.cuh"

namespace layerlr {

/// The passes over an item. `straight`: full tiles of aligned arrays have a loop of their own,
/// without questions.
template <template <class> class D, class P, bool coded, bool codes, bool straight>
struct Elements : Access<D, P, coded, codes> {
  using Base = Access<D, P, coded, codes>;
  using T = typename Base::T;
  using Base::Access;
  using Base::at, Base::d, Base::how, Base::skips, Base::states;
  /// Vectors of four that a worker has in hand, as registers allow; between them lie those of the
  /// other workers.
  static constexpr int in_hand = sizeof(T) == 8 || codes || states > (coded ? 1 : 2) ? 1 : 2;
  static constexpr int stride = 4 * workers;

  /// Call body(whole, vectors, e, n, block) for this worker's vectors, `vectors` of them from
  /// element e on, each of n elements.
  template <class Body>
  LAYERLR_DEVICE void vectors(Body body) const {
    const int count = at.count, first = static_cast<int>(threadIdx.x) * 4;
    constexpr std::integral_constant<int, 1> single;
    if (codes && at.block != code_block) {  // 16 threads have a block that does not fill them
#pragma unroll 1
      for (int e = first; e < count; e += stride) {
        const int block = this->block_of(e), within = e - block * code_block,
                  rest = at.block - within;
        const int n = rest < 4 ? rest : 4;
        body(at.aligned && n == 4, single, block * at.block + within, n, block);
      }
      return;
    }
    int e = first;
    if (straight && at.aligned) {
      constexpr int tile = in_hand * stride;
#pragma unroll 1
      for (; e + tile - first <= count; e += tile) {
        body(Always(), std::integral_constant<int, in_hand>(), e, 4, this->block_of(e));
      }
    }
#pragma unroll 1
    for (; e < count; e += stride) {
      const int n = count - e < 4 ? count - e : 4;
      body(at.aligned && n == 4, single, e, n, this->block_of(e));
    }
  }

  // -- the passes --

  /// Gradient rules, first pass.
  LAYERLR_DEVICE LayerStats measure() const {
    LayerStats sums;
    const bool weights = how.weights, raw = how.raw;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4] = {}, g[many][4], stored[4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        if (weights) this->template load_weights<again>(whole, e + v * stride, n, w[v], stored);
        this->template load_gradient<again>(whole, e + v * stride, n, g[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T x = raw ? g[v][i] : this->decayed(g[v][i], w[v][i]);
          if (weights) add(sums.ww, w[v][i], w[v][i]);
          add(sums.gg, x, x);
        }
      }
    });
    return sums;
  }

  /// Update rules, first pass: the state moves on.
  LAYERLR_DEVICE LayerStats advance() const {
    LayerStats sums;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4], s[many][states + 1][4], stored[4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        this->template load_weights<again>(whole, e + v * stride, n, w[v], stored);
        this->template load_gradient<D<T>::needs_grad ? again : last>(whole, e + v * stride, n,
                                                                      g[v]);
        this->template load_states<again>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool still = skips && !is_finite(g[v][i]);
          g[v][i] = this->decayed(g[v][i], w[v][i]);
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          d.advance(g[v][i], now);
#pragma unroll
          for (int k = 0; k < states; ++k) s[v][k][i] = still ? s[v][k][i] : now[k];
        }
        this->template store_states<again>(whole, e + v * stride, n, block, s[v]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = i < n ? d.direction(g[v][i], now) : T(0);
          add(sums.ww, w[v][i], w[v][i]);
          add(sums.gg, g[v][i], g[v][i]);
          add(sums.uu, u, u);
          add(sums.wu, w[v][i], u);
        }
      }
    });
    return sums;
  }

  /// Update rules, second pass: w <- a*w + b*u, u formed again from the state.
  LAYERLR_DEVICE void apply(T a, T b) const {
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4] = {}, s[many][states + 1][4], stored[many][4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        this->template load_weights<last>(whole, e + v * stride, n, w[v], stored[v]);
        if (D<T>::needs_grad) this->template load_gradient<last>(whole, e + v * stride, n, g[v]);
        this->template load_states<last>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
        T moved[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = d.direction(this->decayed(g[v][i], w[v][i]), now);
          moved[i] = add_step(w[v][i] * a, u * b);
        }
        this->template store_weights<last>(whole, e + v * stride, n, w[v], stored[v], moved);
      }
    });
  }

  /// Gradient rules and no rule: advance with grad*g, apply. `tells`: the sums of what the rule did
  /// not see.
  template <bool tells>
  LAYERLR_DEVICE LayerStats advance_apply(T grad, T a, T b) const {
    constexpr Use use = tells ? last : once;
    LayerStats sums;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4], s[many][states + 1][4], stored[many][4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        this->template load_weights<use>(whole, e + v * stride, n, w[v], stored[v]);
        this->template load_gradient<use>(whole, e + v * stride, n, g[v]);
        this->template load_states<use>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          g[v][i] = this->decayed(g[v][i], w[v][i]);
          if (tells) g[v][i] = g[v][i] * grad;  // 1 where there is no rule
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          d.advance(g[v][i], now);
#pragma unroll
          for (int k = 0; k < states; ++k) s[v][k][i] = now[k];
        }
        this->template store_states<use>(whole, e + v * stride, n, block, s[v]);
        T moved[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = i < n ? d.direction(g[v][i], now) : T(0);
          if (tells) {
            add(sums.ww, w[v][i], w[v][i]);
            add(sums.uu, u, u);
            add(sums.wu, w[v][i], u);
          }
          moved[i] = add_step(w[v][i] * a, u * b);
        }
        this->template store_weights<use>(whole, e + v * stride, n, w[v], stored[v], moved);
      }
    });
    return sums;
  }
};

}  // namespace layerlr
