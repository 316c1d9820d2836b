// From a layer's sums to what is applied and shown: decay, edge rules, memory. Shared by all
// engines.
#pragma once

#include "rules/all.h"

namespace layerlr {

/// A group's rule, and the order that all of its layers follow.
struct RuleConfig {
  RuleId rule = RuleId::Plain;
  bool update = false;                // the step is scaled, not the gradient
  double hyper[max_rule_hyper] = {};  // of the step under way
};

/// What the layer brings along.
struct LayerConfig {
  bool ruled;            // else it takes the plain step
  double lr;             // its own: lr times lr_scale times the direction's rate
  double l2, decoupled;  // weight decay, in one form or the other
  bool first_order;      // of the direction
  bool skip;             // leave the layer alone where a sum is not finite
  double* memory;        // the number that the layer stores, or null: none
  bool whole;            // all of its tensors have a gradient
  double constant = 0;   // the radius of a layer which starts at zero, or the number of its weights
  double plain = 1;      // on lr, until it has that radius, and where the rule steps so at zero
  double taken = 0;      // not 0: w is v - taken*u, a step at that rate; the rule says what stays
  double step = 1;       // number of the coming step
};

/// A rule's answer in terms of w and the bare direction.
struct Verdict {
  LayerScale scale;                 // as applied
  LayerStats seen;                  // the sums that the rule saw
  double shown_a = 1, shown_b = 0;  // a and b with respect to them
  bool skip = false;                // leave the layer alone
};

LAYERLR_HD bool finite(double x) { return x - x == 0; }

/// The sums over v and u of a layer whose weights are w = v - rate*u, from those over w and rate*u.
LAYERLR_HD LayerStats before_the_step(const LayerStats& s, double rate) {
  const double ww = s.ww + 2 * s.wu + s.uu;
  return {ww < 0 ? 0 : ww, s.gg, s.uu / (rate * rate), (s.wu + s.uu) / rate};
}

/// A layer's radius as its memory has it, and the coming step's. 0: no step yet. Below 0: the layer
/// started at zero and takes plain steps until its norm reaches -radius, which it has from there.
LAYERLR_HD double radius_of(double memory, double ww, double start) {
  if (memory == 0 && ww == 0) return 0 - start;
  return memory < 0 && ww >= memory * memory ? -memory : memory;
}

/// A layer's second moment after a step whose gradients have this mean square: the running mean,
/// corrected for its start. memory < 0: there is none yet.
LAYERLR_HD double second_moment(double memory, double square, double beta, double step) {
  if (memory < 0) return square;
  return memory + (1 - beta) / (1 - power(beta, step)) * (square - memory);
}

/// Adam's rate, u being a running mean of gradients from 0; h: both betas, eps.
LAYERLR_HD double rate_of(double second_moment, const double* h, double step) {
  return 1 / ((1 - power(h[0], step)) * (sqrt(second_moment) + h[2]));
}

LAYERLR_HD Verdict decide(const RuleConfig& config, const LayerConfig& c, const LayerStats& sums) {
  const RuleId id = c.ruled ? config.rule : RuleId::Plain;
  const RuleInfo info = rule_info(id);
  Verdict v;
  v.seen = sums;
  if (config.update) {
    v.skip = c.skip && !(finite(sums.ww) && finite(sums.gg) && finite(sums.uu) && finite(sums.wu));
    if (c.taken != 0) v.seen = before_the_step(sums, c.taken);
    const double ww = v.seen.ww, inside = info.decays_apart ? 0 : c.decoupled;
    // the rule sees u + decay*w, whose sums follow from those of u
    const double uu = v.seen.uu + 2 * inside * v.seen.wu + inside * inside * ww;
    v.seen.uu = uu < 0 ? 0 : uu;
    v.seen.wu += inside * ww;
    // the norm of a part of the layer is no radius
    double* const at = c.whole || !info.latches ? c.memory : nullptr;
    double memory = at ? *at : 0;
    if (info.latches && at) memory = radius_of(memory, ww, c.constant);
    if (info.averages) {
      memory = second_moment(at ? memory : -1, sums.gg / c.constant, config.hyper[1], c.step);
      if (at && !v.skip) *at = memory;
      memory = rate_of(memory, config.hyper, c.step);
    }
    if (info.latches && memory < 0) {
      v.scale = {1, 1, -(c.lr * c.plain), c.plain};
    } else {
      v.scale = evaluate(id, v.seen, c.lr, c.l2, memory, config.hyper);
      if (info.plain_at_zero && !(ww > 0)) {
        v.scale.b *= c.plain;
        v.scale.scale *= c.plain;
      }
      if (memory == 0 && ww > 0 && v.scale.b != 0) memory = sqrt(ww);
    }
    // a step of nothing, as checkpoint libraries take one, leaves no trace
    if (info.latches && at && !v.skip && c.lr > 0 && v.seen.uu > 0) *at = memory;
    v.scale.a -= c.lr * (c.decoupled - inside);
    v.shown_a = v.scale.a;
    v.shown_b = v.scale.b;
    v.scale.a += v.scale.b * inside;
    // a*v + b*u in terms of w = v - taken*u and taken*u
    if (c.taken != 0) v.scale.b = v.scale.b / c.taken + v.scale.a;
    return v;
  }
  v.skip = c.skip && !(finite(sums.gg) && (!info.measures_ww || finite(sums.ww)));
  LayerScale f = evaluate(id, sums, c.lr, c.l2, 0, config.hyper);
  if (info.plain_at_zero && !(sums.ww > 0)) f.grad = f.scale = f.grad * c.plain;
  v.shown_a = 1 - c.lr * c.decoupled;
  v.scale = c.first_order ? LayerScale{f.grad, v.shown_a, -c.lr, f.scale}
                          : LayerScale{1, v.shown_a, -(c.lr * f.grad), f.scale};
  v.shown_b = v.scale.b;
  return v;
}

/// Columns of the statistics, float64, one row a layer. uu and wu are of the step that the rule
/// saw; a and b are with respect to it.
enum Column { ww, gg, uu, wu, scale, lr, a, b, skipped, columns };

/// A layer's row of statistics, lr being its own.
LAYERLR_HD void write_row(double* row, const Verdict& v, double lr) {
  if (v.skip) {
    row[Column::skipped] += 1;
    return;
  }
  row[Column::ww] = v.seen.ww;
  row[Column::gg] = v.seen.gg;
  row[Column::uu] = v.seen.uu;
  row[Column::wu] = v.seen.wu;
  row[Column::scale] = v.scale.scale;
  row[Column::lr] = lr * v.scale.scale;
  row[Column::a] = v.shown_a;
  row[Column::b] = v.shown_b;
}

/// A gradient rule's step is known after the second pass only.
LAYERLR_HD void write_step(double* row, const LayerStats& step) {
  row[Column::ww] = step.ww;
  row[Column::uu] = step.uu;
  row[Column::wu] = step.wu;
}

}  // namespace layerlr
