#include "cpu/engine.h"

#include <algorithm>
#include <memory>

#include "cpu/kernels.h"

namespace layerlr {
namespace {

/// Layers above this many elements are shared out chunk by chunk, smaller ones whole.
constexpr int64_t share_above = 8 * chunk_size;

double count(const TensorRow& t) {
  return t.step_is_double ? *static_cast<const double*>(t.step)
                          : static_cast<double>(*static_cast<const float*>(t.step));
}

int param_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

class Step {
 public:
  Step(Plan& plan, const StepConfig& config) : plan_(plan), config_(config) {
    measured_ = plan.has_rule || config.skip;
    tensors_.resize(plan.tensors.size());
    for (size_t i = 0; i < plan.tensors.size(); ++i) {
      if (plan.tensors[i].active) prepare(i);
    }
  }

  void run(int threads, const ParallelFor& parallel) {
    const int64_t n = static_cast<int64_t>(plan_.layers.size());
    if (threads == 1) {
      for (int64_t l = 0; l < n; ++l) whole_layer(l);
    } else {
      std::vector<int64_t> small;
      for (int64_t l = 0; l < n; ++l) {
        if (plan_.layers[l].numel > share_above) {
          shared_layer(l, parallel);
        } else {
          small.push_back(l);
        }
      }
      parallel(static_cast<int64_t>(small.size()), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) whole_layer(small[i]);
      });
    }
    advance_counts();
  }

 private:
  struct alignas(64) Scalars {
    char room[direction_room];
  };
  struct Tensor {
    const Kernels* kernels;
    const void* direction;
    double rate;
  };

  /// Scalars of a tensor's coming step; tensors of one dtype at the same step share them.
  void prepare(size_t i) {
    const TensorRow& row = plan_.tensors[i];
    const double t = count(row) + 1;
    const bool plain = row.held == Held::nearest;
    for (const Made& made : made_) {
      if (made.t == t && made.dtype == row.dtype && made.plain == plain) {
        tensors_[i] = made.tensor;
        return;
      }
    }
    const Kernels& k = kernels_for(plan_.direction, row.dtype, plain);
    scalars_.push_back(std::make_unique<Scalars>());
    k.make(scalars_.back()->room, config_.direction_hyper, t);
    tensors_[i] = {&k, scalars_.back()->room, k.rate(config_.direction_hyper, t)};
    made_.push_back({t, row.dtype, plain, tensors_[i]});
  }

  Piece piece(const Chunk& chunk) const {
    const TensorRow& row = plan_.tensors[chunk.tensor];
    const Tensor& t = tensors_[chunk.tensor];
    const int64_t bytes = chunk.begin * param_bytes(row.dtype);
    Piece p;
    p.w = static_cast<char*>(row.param) + bytes;
    p.g = static_cast<const char*>(row.grad) + bytes;
    for (int k = 0; k < t.kernels->states; ++k) {
      p.s[k] = static_cast<char*>(row.state[k]) + chunk.begin * t.kernels->state_bytes;
    }
    p.n = chunk.count;
    p.direction = t.direction;
    p.sign = config_.sign;
    p.l2 = config_.l2();
    p.skip = config_.skip;
    p.held = row.held;
    if (row.extra) {
      const int64_t each = row.held == Held::master ? sizeof(float) : param_bytes(row.dtype);
      p.extra = static_cast<char*>(row.extra) + chunk.begin * each;
    }
    if (row.held == Held::stochastic) p.key = rounding_key(row.seed, count(row) + 1);
    p.place = static_cast<uint32_t>(chunk.begin);
    return p;
  }

  bool active(const Chunk& chunk) const { return plan_.tensors[chunk.tensor].active; }

  // -- the two passes over a chunk, and what lies between --------------------------------------

  void first_pass(const Layer& layer, int32_t c) {
    const Chunk& chunk = plan_.chunks[c];
    if (!active(chunk)) return;
    const Kernels& k = *tensors_[chunk.tensor].kernels;
    const RuleInfo info = plan_.rule_of(layer);
    plan_.partials[c] = plan_.rule.update
                            ? k.advance(piece(chunk))
                            : k.measure(piece(chunk), {info.measures_ww, info.raw_gradient});
  }

  /// Sum the chunks in order, ask the rule, start the layer's statistics.
  Verdict between(int64_t l) {
    const Layer& layer = plan_.layers[l];
    const TensorRow* first = nullptr;
    double rate = 1;
    bool first_order = true, whole = true;
    LayerStats sums;
    for (int32_t c = layer.chunk_begin; c < layer.chunk_end; ++c) {
      const Chunk& chunk = plan_.chunks[c];
      if (!active(chunk)) {
        whole = false;
        continue;
      }
      if (!first) {
        first = &plan_.tensors[chunk.tensor];
        rate = tensors_[chunk.tensor].rate;
        first_order = tensors_[chunk.tensor].kernels->first_order;
      }
      if (measured_) sums = sums + plan_.partials[c];
    }
    const double lr = config_.lr * layer.lr_scale * rate;
    const LayerConfig of{layer.ruled, lr,           config_.l2(), config_.apart(),
                         first_order, config_.skip, layer.kept,   whole};
    const Verdict v = decide(plan_.rule, of, sums);
    plan_.skips[l] = v.keep;
    if (measured_ && first) {
      double* row = plan_.stats + l * columns;
      if (v.keep) {
        row[Column::skipped] += 1;
      } else {
        const double values[] = {v.seen.ww,     v.seen.gg,          v.seen.uu, v.seen.wu,
                                 v.scale.scale, lr * v.scale.scale, v.shown_a, v.scale.b};
        std::copy(std::begin(values), std::end(values), row);
      }
    }
    return v;
  }

  void second_pass(int32_t c, const Verdict& v) {
    const Chunk& chunk = plan_.chunks[c];
    if (!active(chunk) || v.keep) return;
    const Kernels& k = *tensors_[chunk.tensor].kernels;
    if (plan_.rule.update) {
      k.apply(piece(chunk), v.scale);
    } else if (measured_) {
      plan_.partials[c] = k.advance_apply_measured(piece(chunk), v.scale);
    } else {
      k.advance_apply(piece(chunk), v.scale);
    }
  }

  /// A gradient rule's step is known after the second pass only.
  void after(int64_t l, const Verdict& v) {
    const Layer& layer = plan_.layers[l];
    if (!measured_ || v.keep || plan_.rule.update) return;
    LayerStats sums;
    bool any = false;
    for (int32_t c = layer.chunk_begin; c < layer.chunk_end; ++c) {
      if (!active(plan_.chunks[c])) continue;
      sums = sums + plan_.partials[c];
      any = true;
    }
    if (!any) return;
    double* row = plan_.stats + l * columns;
    row[Column::ww] = sums.ww;
    row[Column::uu] = sums.uu;
    row[Column::wu] = sums.wu;
  }

  // -- over a layer ----------------------------------------------------------------------------

  void whole_layer(int64_t l) {
    const Layer& layer = plan_.layers[l];
    if (measured_) {
      for (int32_t c = layer.chunk_begin; c < layer.chunk_end; ++c) first_pass(layer, c);
    }
    const Verdict v = between(l);
    // last chunk first: it is the one still in cache
    for (int32_t c = layer.chunk_end; c-- > layer.chunk_begin;) second_pass(c, v);
    after(l, v);
  }

  void shared_layer(int64_t l, const ParallelFor& parallel) {
    const Layer& layer = plan_.layers[l];
    const int64_t n = layer.chunk_end - layer.chunk_begin;
    if (measured_) {
      parallel(n, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) first_pass(layer, int32_t(layer.chunk_begin + c));
      });
    }
    const Verdict v = between(l);
    parallel(n, [&](int64_t begin, int64_t end) {
      for (int64_t c = end; c-- > begin;) second_pass(int32_t(layer.chunk_begin + c), v);
    });
    after(l, v);
  }

  /// A tensor's count stands still where all of its layers were left alone.
  void advance_counts() {
    std::vector<char> kept(plan_.tensors.size(), 1);
    for (const Span& span : plan_.spans) kept[span.tensor] &= plan_.skips[span.layer];
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      TensorRow& row = plan_.tensors[i];
      if (!row.active || kept[i]) continue;
      if (row.step_is_double) {
        *static_cast<double*>(row.step) += 1;
      } else {
        *static_cast<float*>(row.step) += 1;
      }
    }
  }

  struct Made {
    double t;
    DType dtype;
    bool plain;
    Tensor tensor;
  };

  Plan& plan_;
  const StepConfig& config_;
  bool measured_;
  std::vector<Tensor> tensors_;
  std::vector<Made> made_;
  std::vector<std::unique_ptr<Scalars>> scalars_;
};

}  // namespace

void step(Plan& plan, const StepConfig& config, int threads, const ParallelFor& parallel) {
  Step(plan, config).run(threads, parallel);
}

}  // namespace layerlr
