// From a layer's sums to what is applied: decay, edge rules, the kept number. Shared by all
// engines.
#pragma once

#include "rules/all.h"

namespace layerlr {

/// A group's rule, and the order that all of its layers follow.
struct RuleConfig {
  RuleId rule = RuleId::Plain;
  bool update = false;  // the step is scaled, not the gradient
  double hyper[max_rule_hyper] = {};
};

/// What the layer brings along.
struct LayerConfig {
  bool ruled;            // else it takes the plain step
  double lr;             // its own: lr times lr_scale times the direction's rate
  double l2, decoupled;  // weight decay, in one form or the other
  bool first_order;      // of the direction
  bool skip;             // leave the layer alone where a sum is not finite
  double* kept;          // a number that lives from step to step, or null: the rule keeps none
  bool whole;            // all of its tensors have a gradient
};

/// A rule's answer in terms of w and the bare direction, and what is left alone.
struct Verdict {
  LayerScale scale;    // as applied
  LayerStats seen;     // the sums that the rule saw
  double shown_a = 1;  // a with respect to them
  bool keep = false;
};

LAYERLR_HD bool finite(double x) { return x - x == 0; }

LAYERLR_HD Verdict decide(const RuleConfig& config, const LayerConfig& c, const LayerStats& sums) {
  const RuleId id = c.ruled ? config.rule : RuleId::Plain;
  const RuleInfo info = rule_info(id);
  Verdict v;
  v.seen = sums;
  if (config.update) {
    // the rule sees u + decoupled*w, whose sums follow from those of u
    v.keep = c.skip && !(finite(sums.ww) && finite(sums.gg) && finite(sums.uu) && finite(sums.wu));
    const double uu = sums.uu + 2 * c.decoupled * sums.wu + c.decoupled * c.decoupled * sums.ww;
    v.seen.uu = uu < 0 ? 0 : uu;
    v.seen.wu = sums.wu + c.decoupled * sums.ww;
    // the norm of a part of the layer is no radius
    double* const at = c.whole || !info.latches ? c.kept : nullptr;
    const double kept = at ? *at : 0;
    v.scale = evaluate(id, v.seen, c.lr, c.l2, kept, config.hyper);
    v.shown_a = v.scale.a;
    v.scale.a = v.scale.a + v.scale.b * c.decoupled;
    if (at && info.latches && !v.keep && kept == 0 && sums.ww > 0 && v.scale.b != 0) {
      *at = sqrt(sums.ww);
    }
    return v;
  }
  v.keep = c.skip && !(finite(sums.gg) && (!info.measures_ww || finite(sums.ww)));
  const LayerScale f = evaluate(id, sums, c.lr, c.l2, 0, config.hyper);
  v.shown_a = 1 - c.lr * c.decoupled;
  v.scale = c.first_order ? LayerScale{f.grad, v.shown_a, -c.lr, f.scale}
                          : LayerScale{1, v.shown_a, -(c.lr * f.grad), f.scale};
  return v;
}

}  // namespace layerlr
