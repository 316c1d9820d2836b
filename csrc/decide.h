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
};

/// A rule's answer in terms of w and the bare direction.
struct Verdict {
  LayerScale scale;    // as applied
  LayerStats seen;     // the sums that the rule saw
  double shown_a = 1;  // a with respect to them
  bool skip = false;   // leave the layer alone
};

LAYERLR_HD bool finite(double x) { return x - x == 0; }

LAYERLR_HD Verdict decide(const RuleConfig& config, const LayerConfig& c, const LayerStats& sums) {
  const RuleId id = c.ruled ? config.rule : RuleId::Plain;
  const RuleInfo info = rule_info(id);
  Verdict v;
  v.seen = sums;
  if (config.update) {
    // the rule sees u + decoupled*w, whose sums follow from those of u
    v.skip = c.skip && !(finite(sums.ww) && finite(sums.gg) && finite(sums.uu) && finite(sums.wu));
    const double uu = sums.uu + 2 * c.decoupled * sums.wu + c.decoupled * c.decoupled * sums.ww;
    v.seen.uu = uu < 0 ? 0 : uu;
    v.seen.wu = sums.wu + c.decoupled * sums.ww;
    // the norm of a part of the layer is no radius
    double* const at = c.whole || !info.latches ? c.memory : nullptr;
    const double memory = at ? *at : 0;
    v.scale = evaluate(id, v.seen, c.lr, c.l2, memory, config.hyper);
    v.shown_a = v.scale.a;
    v.scale.a = v.scale.a + v.scale.b * c.decoupled;
    if (at && info.latches && !v.skip && memory == 0 && sums.ww > 0 && v.scale.b != 0) {
      *at = sqrt(sums.ww);
    }
    return v;
  }
  v.skip = c.skip && !(finite(sums.gg) && (!info.measures_ww || finite(sums.ww)));
  const LayerScale f = evaluate(id, sums, c.lr, c.l2, 0, config.hyper);
  v.shown_a = 1 - c.lr * c.decoupled;
  v.scale = c.first_order ? LayerScale{f.grad, v.shown_a, -c.lr, f.scale}
                          : LayerScale{1, v.shown_a, -(c.lr * f.grad), f.scale};
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
  row[Column::b] = v.scale.b;
}

/// A gradient rule's step is known after the second pass only.
LAYERLR_HD void write_step(double* row, const LayerStats& step) {
  row[Column::ww] = step.ww;
  row[Column::uu] = step.uu;
  row[Column::wu] = step.wu;
}

}  // namespace layerlr
