#include "plan.h"

#include <algorithm>
#include <cmath>

namespace layerlr {

void Plan::finish() {
  std::vector<std::vector<const Span*>> parts(layers.size());
  for (const Span& span : spans) parts[span.layer].push_back(&span);
  for (size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers[l];
    layer.chunk_begin = static_cast<int32_t>(chunks.size());
    for (const Span* span : parts[l]) {
      int64_t begin = span->begin;
      do {  // an empty tensor has an empty chunk: it takes part all the same
        const int64_t count = std::min(chunk_size, span->end - begin);
        chunks.push_back({span->tensor, static_cast<int32_t>(count), begin});
        begin += count;
      } while (begin < span->end);
      layer.numel += span->end - span->begin;
    }
    layer.chunk_end = static_cast<int32_t>(chunks.size());
  }
  partials.resize(chunks.size());
  kept.resize(layers.size());
}

Verdict decide(const Plan& plan, const StepConfig& c, const Layer& layer, const LayerStats& sums,
               double lr, bool first_order, bool whole) {
  const RuleId id = plan.rule_of(layer);
  const RuleInfo& info = rule_infos[static_cast<int>(id)];
  const double decay = c.decoupled ? c.weight_decay : 0;
  Verdict v;
  v.seen = sums;
  if (info.update) {
    // the rule sees u + decay*w, whose sums follow from those of u
    v.keep = c.skip && !(std::isfinite(sums.ww) && std::isfinite(sums.gg) &&
                         std::isfinite(sums.uu) && std::isfinite(sums.wu));
    v.seen.uu = std::max(sums.uu + 2 * decay * sums.wu + decay * decay * sums.ww, 0.0);
    v.seen.wu = sums.wu + decay * sums.ww;
    const double radius = layer.radius && whole ? *layer.radius : 0;
    v.scale = evaluate(id, v.seen, lr, Plan::l2(c), radius, plan.rule_hyper);
    v.shown_a = v.scale.a;
    v.scale.a = v.scale.a + v.scale.b * decay;
    if (layer.radius && whole && !v.keep && radius == 0 && sums.ww > 0 && v.scale.b != 0) {
      *layer.radius = std::sqrt(sums.ww);
    }
    return v;
  }
  v.keep = c.skip && !(std::isfinite(sums.gg) && (!info.measures_ww || std::isfinite(sums.ww)));
  const LayerScale f = evaluate(id, sums, lr, Plan::l2(c), 0, plan.rule_hyper);
  v.shown_a = 1 - lr * decay;
  v.scale = first_order ? LayerScale{f.grad, v.shown_a, -lr, f.scale}
                        : LayerScale{1, v.shown_a, -(lr * f.grad), f.scale};
  return v;
}

std::vector<std::string> direction_names() {
  return {
#define LAYERLR_NAME(D) D<float>::name,
      LAYERLR_DIRECTIONS(LAYERLR_NAME)
#undef LAYERLR_NAME
  };
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const RuleInfo& info : rule_infos) names.emplace_back(info.name);
  return names;
}

}  // namespace layerlr
