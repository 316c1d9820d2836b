// Plain, heavy-ball, Nesterov and averaged momentum.
#pragma once

#include "core.h"

namespace layerlr {

/// u = g.
template <class T>
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr int states = 0;
  static constexpr bool first_order = true;  // a gradient rule scales g before the state sees it
  static constexpr bool needs_grad = true;   // direction() reads g, so the second pass must too

  LAYERLR_HD Sgd(const double*, double) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }   // factor on lr at step t
  LAYERLR_HD static constexpr bool nonnegative(int) { return false; }  // whether state k is

  template <class V>
  LAYERLR_HD void advance(V, V*) const {}
  template <class V, class S>
  LAYERLR_HD V direction(V g, S) const {
    return g;
  }
};

/// m <- mu*m + gain*g, u = m; the first step is not dampened (as torch).
template <class T>
struct Momentum {
  static constexpr const char* name = "momentum";
  static constexpr int states = 1;
  static constexpr bool first_order = true;
  static constexpr bool needs_grad = false;
  T mu, gain;

  LAYERLR_HD Momentum(T momentum, T gain) : mu(momentum), gain(gain) {}
  LAYERLR_HD Momentum(const double* h, double t) : Momentum(T(h[0]), T(t == 1 ? 1 : 1 - h[1])) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }
  LAYERLR_HD static constexpr bool nonnegative(int) { return false; }

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] * mu + g * gain;
  }
  template <class V, class S>
  LAYERLR_HD V direction(V, S s) const {
    return s[0];
  }
};

/// m <- mu*m + g, u = g + mu*m; Caffe's (1 + mu)*m - mu*m_old is the same number.
template <class T>
struct Nesterov : Momentum<T> {
  static constexpr const char* name = "nesterov";
  static constexpr bool needs_grad = true;
  using Momentum<T>::Momentum;

  template <class V, class S>
  LAYERLR_HD V direction(V g, S s) const {
    return g + s[0] * this->mu;
  }
};

/// m <- mu*m + (1 - mu)*g, u = m, without bias correction (SGD_AMom, arXiv:1806.01603).
template <class T>
struct AveragedMomentum : Momentum<T> {
  static constexpr const char* name = "averaged_momentum";
  LAYERLR_HD AveragedMomentum(const double* h, double) : Momentum<T>(T(h[0]), T(1 - h[0])) {}
};

}  // namespace layerlr
