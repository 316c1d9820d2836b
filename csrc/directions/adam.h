// Adam and AMSGrad.
#pragma once

#include "core.h"

namespace layerlr {

/// u = m_hat / (sqrt(v_hat) + eps). Kingma & Ba 2015, Algorithm 1.
template <class T>
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr int states = 2;
  static constexpr bool first_order = false;
  static constexpr bool needs_grad = false;
  T beta1, gain, beta2, one_minus_beta2, eps, unbias1, unbias2;

  /// h: beta1, beta2, eps, correct the bias, average the gradient (the last two: Lamb's options).
  LAYERLR_HD Adam(const double* h, double t)
      : beta1(T(h[0])),
        gain(T(h[4] != 0 ? 1 - h[0] : 1)),
        beta2(T(h[1])),
        one_minus_beta2(T(1 - h[1])),
        eps(T(h[2])),
        unbias1(T(h[3] != 0 ? 1 / (1 - power(h[0], t)) : 1)),
        unbias2(T(h[3] != 0 ? 1 / root(1 - power(h[1], t)) : 1)) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }
  LAYERLR_HD static constexpr bool nonnegative(int k) { return k > 0; }

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] * beta1 + g * gain;
    s[1] = s[1] * beta2 + (g * g) * one_minus_beta2;
  }
  template <class V, class S>
  LAYERLR_HD V direction(V, S s) const {
    return (s[0] * unbias1) / (s.root_of(1) * unbias2 + eps);
  }
};

/// Adam over the largest v seen so far. Reddi et al. 2018, Algorithm 2, as torch.
template <class T>
struct AmsGrad : Adam<T> {
  static constexpr const char* name = "amsgrad";
  static constexpr int states = 3;
  using Adam<T>::Adam;

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    Adam<T>::advance(g, s);
    s[2] = larger(s[2], s[1]);
  }
  template <class V, class S>
  LAYERLR_HD V direction(V, S s) const {
    return (s[0] * this->unbias1) / (s.root_of(2) * this->unbias2 + this->eps);
  }
};

}  // namespace layerlr
