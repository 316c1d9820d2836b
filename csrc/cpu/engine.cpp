#include "cpu/engine.h"

#include <algorithm>
#include <memory>

#include "cpu/kernels.h"

namespace layerlr {
namespace {

/// Layers above this many elements are shared out chunk by chunk, smaller ones whole.
constexpr int64_t share_above = 8 * chunk_size;

class Step {
 public:
  Step(Plan& plan, const StepConfig& config, const Threads& threads)
      : plan_(plan), config_(config), threads_(threads) {
    std::copy(std::begin(config.rule), std::end(config.rule), plan.rule.hyper);
    measured_ = plan.has_rule || config.skip != 0;
    tensors_.resize(plan.tensors.size());
    for (size_t i = 0; i < plan.tensors.size(); ++i) {
      if (plan.tensors[i].active()) prepare(i);
    }
  }

  void run() {
    for_layers([&](int64_t l, const auto& parts) {
      Piece kept;
      if (measured_) first_pass(l, kept, parts);
      second_pass(l, gather(l), kept, parts);
    });
    advance_counts();
  }

  void measure(LayerStats* sums) {
    for_layers([&](int64_t l, const auto& parts) {
      Piece kept;
      first_pass(l, kept, parts);
      sums[l] = gather(l).sums;
    });
  }

  void apply(const LayerStats* sums) {
    for_layers([&](int64_t l, const auto& parts) {
      Gathered found = gather(l);
      found.sums = sums[l];
      Piece kept;
      second_pass(l, found, kept, parts);
    });
    advance_counts();
  }

  void norms(double* sums) {
    for_layers([&](int64_t l, const auto& parts) {
      Piece kept;
      over_chunks(l, kept, parts, [&](int32_t c, const Kernels& k, const Piece& p) {
        plan_.partials[c] = k.measure(p, {false, true});
      });
      sums[l] = gather(l).sums.gg;
    });
  }

 private:
  struct alignas(64) Scalars {
    char room[direction_room];
  };
  struct Tensor {
    const Kernels* kernels;
    const void* direction;
    double rate, step;
  };

  /// A layer's sums, the first of its tensors that take part (null: none), whether all do.
  struct Gathered {
    LayerStats sums;
    const Tensor* first = nullptr;
    bool whole = true;
  };

  /// Scalars of a tensor's coming step; tensors of one dtype at the same step share them.
  void prepare(size_t i) {
    const Row& row = plan_.tensors[i];
    const double t = row.count() + 1;
    const Coding coding = row.coding;
    for (const Made& made : made_) {
      if (made.t == t && made.dtype == row.dtype && made.coding == coding) {
        tensors_[i] = made.tensor;
        return;
      }
    }
    const Kernels& k = kernels_for(plan_.direction, row.dtype, coding);
    scalars_.push_back(std::make_unique<Scalars>());
    k.make(scalars_.back()->room, config_.direction, t);
    tensors_[i] = {&k, scalars_.back()->room, k.rate(config_.direction, t), t};
    made_.push_back({t, row.dtype, coding, tensors_[i]});
  }

  void fill(Piece& p, const Chunk& chunk, const Row& row, const Tensor& t) const {
    p.w = row.param.from(chunk.begin, row.block, param_bytes(row.dtype), row.dtype);
    p.g = row.grad.from(chunk.begin, row.block, param_bytes(row.dtype), row.dtype);
    for (int k = 0; k < t.kernels->states; ++k) {
      p.s[k] = row.state[k].from(chunk.begin, row.block, state_bytes(row.dtype), row.dtype);
    }
    p.n = chunk.count;
    p.dtype = row.dtype;
    p.block = row.block;
    p.direction = t.direction;
    p.grad_factor = config_.grad_factor;
    p.l2 = config_.l2;
    p.skip = config_.skip != 0;
    if (p.w.codec == Codec::stochastic) p.key = rounding_key(row.seed, row.count() + 1);
    p.place = static_cast<uint32_t>(chunk.begin);
  }

  bool active(int32_t c) const { return plan_.tensors[plan_.chunks[c].tensor].active(); }

  // -- over layers and chunks ------------------------------------------------------------------

  /// Call body(l, parts) for every layer; parts(n, f) calls f(begin, end) over parts of [0, n).
  template <class Body>
  void for_layers(Body body) const {
    const auto one = [](int64_t n, const auto& f) { f(int64_t(0), n); };
    const int64_t n = static_cast<int64_t>(plan_.layers.size());
    if (threads_.count == 1) {
      for (int64_t l = 0; l < n; ++l) body(l, one);
      return;
    }
    std::vector<int64_t> small;
    for (int64_t l = 0; l < n; ++l) {
      if (plan_.layers[l].numel > share_above) {
        body(l, threads_.parallel);
      } else {
        small.push_back(l);
      }
    }
    threads_.parallel(static_cast<int64_t>(small.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(small[i], one);
    });
  }

  /// Call body(c, its kernels, its piece) for the layer's chunks that take part. The piece of a
  /// layer's only chunk is kept for its second pass: tiny layers are nothing else.
  template <class Parts, class Body>
  void over_chunks(int64_t l, Piece& kept, const Parts& parts, Body body,
                   bool last_first = false) const {
    const Layer& layer = plan_.layers[l];
    const auto visit = [&](int32_t c, Piece& p) {
      const Chunk& chunk = plan_.chunks[c];
      const Row& row = plan_.tensors[chunk.tensor];
      if (!row.active()) return;
      const Tensor& t = tensors_[chunk.tensor];
      if (!p.direction) fill(p, chunk, row, t);
      body(c, *t.kernels, p);
    };
    const int64_t n = layer.chunk_end - layer.chunk_begin;
    if (n == 1) return visit(layer.chunk_begin, kept);
    parts(n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = last_first ? begin + end - 1 - i : i;
        Piece own;
        visit(static_cast<int32_t>(layer.chunk_begin + at), own);
      }
    });
  }

  /// Add the sums of the layer's chunks in order.
  Gathered gather(int64_t l) const {
    Gathered found;
    const Layer& layer = plan_.layers[l];
    for (int32_t c = layer.chunk_begin; c < layer.chunk_end; ++c) {
      if (!active(c)) {
        found.whole = false;
        continue;
      }
      if (!found.first) found.first = &tensors_[plan_.chunks[c].tensor];
      found.sums = found.sums + plan_.partials[c];
    }
    return found;
  }

  // -- the two passes over a layer, and what lies between --------------------------------------
  // Inlined, as a call would show where layers are small: 0.01 us of each.

  template <class Parts>
  void first_pass(int64_t l, Piece& kept, const Parts& parts) {
    const RuleInfo info = plan_.rule_of(plan_.layers[l]);
    over_chunks(l, kept, parts, [&](int32_t c, const Kernels& k, const Piece& p) {
      plan_.partials[c] =
          plan_.rule.update ? k.advance(p) : k.measure(p, {info.measures_ww, info.raw_gradient});
    });
  }

  template <class Parts>
  LAYERLR_HD void second_pass(int64_t l, const Gathered& found, Piece& kept, const Parts& parts) {
    const Verdict v = conclude(l, found);
    if (v.skip) return;
    const bool tells = measured_ && !plan_.rule.update;
    const auto chunk = [&](int32_t c, const Kernels& k, const Piece& p) {
      if (plan_.rule.update) {
        k.apply(p, v.scale);
      } else if (tells) {
        plan_.partials[c] = k.advance_apply_measured(p, v.scale);
      } else {
        k.advance_apply(p, v.scale);
      }
    };
    over_chunks(l, kept, parts, chunk, true);  // the last one is still in cache
    if (!tells || !found.first) return;
    const LayerStats step = gather(l).sums;  // a gradient rule's is known now only
    write_step(plan_.stats + l * columns, step);
  }

  /// Ask the rule, start the layer's statistics.
  LAYERLR_HD Verdict conclude(int64_t l, const Gathered& found) {
    const Layer& layer = plan_.layers[l];
    const Tensor* const first = found.first;
    const double lr = config_.lr * layer.lr_scale * (first ? first->rate : 1);
    const bool first_order = !first || first->kernels->first_order;
    const LayerConfig of{layer.ruled,
                         lr,
                         config_.l2,
                         config_.decoupled_decay,
                         first_order,
                         config_.skip != 0,
                         first ? layer.memory : nullptr,
                         found.whole,
                         layer.start_radius,
                         config_.plain,
                         config_.taken,
                         first ? first->step : 1};
    const Verdict v = decide(plan_.rule, of, measured_ ? found.sums : LayerStats());
    plan_.skips[l] = v.skip;
    if (measured_ && first) write_row(plan_.stats + l * columns, v, lr);
    return v;
  }

  /// A tensor's count stands still where all of its layers were left alone.
  void advance_counts() {
    std::vector<char> skipped(plan_.tensors.size(), 1);
    for (const Span& span : plan_.spans) skipped[span.tensor] &= plan_.skips[span.layer];
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      const Row& row = plan_.tensors[i];
      if (row.active() && !skipped[i]) row.count_step();
    }
  }

  struct Made {
    double t;
    DType dtype;
    Coding coding;
    Tensor tensor;
  };

  Plan& plan_;
  const StepConfig& config_;
  const Threads& threads_;
  bool measured_;
  std::vector<Tensor> tensors_;
  std::vector<Made> made_;
  std::vector<std::unique_ptr<Scalars>> scalars_;
};

}  // namespace

void step(Plan& plan, const StepConfig& config, const Threads& threads) {
  Step(plan, config, threads).run();
}

void measure(Plan& plan, const StepConfig& config, const Threads& threads, LayerStats* sums) {
  Step(plan, config, threads).measure(sums);
}

void apply(Plan& plan, const StepConfig& config, const Threads& threads, const LayerStats* sums) {
  Step(plan, config, threads).apply(sums);
}

void norms(Plan& plan, const StepConfig& config, const Threads& threads, double* sums) {
  Step(plan, config, threads).norms(sums);
}

}  // namespace layerlr
