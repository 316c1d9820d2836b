// A block: workers, who do what is to be done to elements, and one warp that schedules for them.
#pragma once

#include <new>

#include "cuda/elements.cuh"
#include "cuda/layer.cuh"

namespace layerlr {

enum What : int32_t { nothing, measures, applies, ends };

/// An item, ready to be worked on.
struct Work {
  Arrays at;
  Gradient how;
  DType dtype;
  What what;
  bool waits;   // its verdict was not there yet
  bool sums;    // there are sums to add, of nothing perhaps
  int scalars;  // which of the block's two
  int layer, slot;
  Phase pass;
  double grad, a, b;
};

/// The scalars of a direction for step t, in the type of the arithmetic.
template <template <class> class D>
struct Scalars {
  double t;
  bool wide;
  alignas(D<double>) char room[sizeof(D<double>)];
};

/// What the threads of a block share. Of each pair one is in use while the other is made ready.
template <template <class> class D>
struct Shared {
  Partials partials[2];
  Work work[2];
  Scalars<D> scalars[2];
  bool last;  // this block was the last to end
};

/// The barrier of all threads of the block.
LAYERLR_DEVICE void meet() { __syncthreads(); }

// -- workers
// ----------------------------------------------------------------------------------------

/// Dtypes that a kernel knows. with_type calls body(P(), whether weights may have something
/// beside).
template <class P, bool coded>
struct Only {
  static constexpr bool any = false;
  template <class Body>
  LAYERLR_DEVICE static void with_type(DType, Body body) {
    body(P(), std::bool_constant<coded>());
  }
};
struct AnyDtype {
  static constexpr bool any = true;
  template <class Body>
  LAYERLR_DEVICE static void with_type(DType dtype, Body body) {
    switch (dtype) {
      case DType::f32:
        return body(float(), std::false_type());
      case DType::f64:
        return body(double(), std::false_type());
      case DType::bf16:
        return body(BFloat16(), std::true_type());
      case DType::f16:
        return body(Float16(), std::true_type());
    }
  }
};

/// What a worker does, item after item.
template <template <class> class D, class F, Order order>
LAYERLR_DEVICE void work_on_items(Shared<D>& shared) {
  for (int k = 0;; ++k) {
    const Work& now = shared.work[k & 1];
    meet();  // item k is ready
    if (now.waits) meet();
    if (now.what == ends) return;
    if (now.what == nothing) continue;
    LayerStats sums;
    F::with_type(now.dtype, [&](auto p, auto coded) {
      using P = decltype(p);
      using T = typename Wide<P>::type;
      const Arrays at = now.at;
      const Gradient how = now.how;
      const D<T> d = *reinterpret_cast<const D<T>*>(shared.scalars[now.scalars].room);
      const Elements<D, P, decltype(coded)::value, !F::any> elements(at, d, how);
      const T grad = T(now.grad), a = T(now.a), b = T(now.b);
      if constexpr (order == unmeasured) {
        elements.template advance_apply<false>(grad, a, b);
      } else if constexpr (order == gradient_rule) {
        sums = now.what == measures ? elements.measure()
                                    : elements.template advance_apply<true>(grad, a, b);
      } else if (now.what == measures) {
        sums = elements.advance();
      } else {
        elements.apply(a, b);
      }
    });
    if (order != unmeasured && now.sums) {
      reinterpret_cast<LayerStats&>(shared.partials[k & 1].of[threadIdx.x]) = sums;
    }
  }
}

// -- the warp that schedules
// --------------------------------------------------------------------------

/// While the workers are at item k, it adds the sums of item k - 1 and makes item k + 1 ready; for
/// item k + 2 it has asked for a ticket. All lanes do the same but for what only one may do.
template <template <class> class D, class F, Order order>
struct Scheduler {
  static constexpr unsigned all = 0xffffffffu;
  const StepArgs& args;
  Shared<D>& shared;
  const int lane = threadIdx.x % 32;
  const uint32_t epoch;
  int asked;       // the ticket under way, in lane 0
  int latest = 0;  // scalars of the last item that wanted some

  LAYERLR_DEVICE Scheduler(const StepArgs& args, Shared<D>& shared)
      : args(args),
        shared(shared),
        epoch(args.sync->epoch + 1),
        asked(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  LAYERLR_DEVICE void run() {
    if (lane == 0) shared.scalars[0].t = shared.scalars[1].t = 0;
    __syncwarp();
    ask();
    Item item = next_item();
    prepare(shared.work[0], item);
    for (int k = 0;; ++k) {
      Work& now = shared.work[k & 1];
      Work& other = shared.work[~k & 1];
      meet();  // the workers begin with item k, and have ended the one before
      if (now.what != ends) item = next_item();
      if (k) finish(other, shared.partials[~k & 1]);
      if (now.waits) {
        wait_for_verdict(now);
        meet();
      }
      if (now.what == ends) return;
      prepare(other, item);
    }
  }

  // -- tickets
  // ----------------------------------------------------------------------------------------

  /// Ask for a ticket. Where both passes are in one launch tickets come from a counter: an item
  /// waits for nothing but items before it, and the blocks that took those are running.
  LAYERLR_DEVICE void ask() {
    if (args.phase != whole_step) {
      asked += static_cast<int>(gridDim.x);
    } else if (lane == 0) {
      asked = static_cast<int>(device::add_relaxed(&args.sync->ticket, 1));
    }
  }

  /// The next item that this launch has to do with, or one of no span. The ticket for it has been
  /// asked for, that for the one after it is.
  LAYERLR_DEVICE Item next_item() {
    for (;;) {
      const int ticket = __shfl_sync(all, asked, 0);
      if (ticket >= args.items) return {-1, 0, 0, first_pass};
      ask();
      const Item item = args.item[ticket];
      if (!args.measured || args.phase == whole_step || item.pass == args.phase) return item;
    }
  }

  // -- an item to come
  // --------------------------------------------------------------------------------

  LAYERLR_DEVICE void prepare(Work& work, const Item& item) {
    Work w{};
    w.what = ends;
    if (item.span >= 0) fill(w, item);
    __syncwarp();  // all lanes have read what was there
    if (lane == 0) work = w;
  }

  LAYERLR_DEVICE void fill(Work& w, const Item& item) {
    const DeviceSpan& span = args.spans[item.span];
    const bool active = span.grad != nullptr;
    w.layer = span.layer;
    w.slot = item.slot;
    w.pass = args.phase == whole_step ? item.pass : args.phase;
    w.what = !active ? nothing : w.pass == first_pass ? measures : applies;
    w.sums = order == gradient_rule || (order == update_rule && w.pass == first_pass);
    w.grad = 1;
    if (w.pass == second_pass) fill_verdict(w);
    if (!active) return;
    fill_arrays(w, span, item);
    const RuleInfo info = rule_info(span.ruled ? args.rule.rule : RuleId::Plain);
    const double l2 = l2_of(args);
    const bool weights = info.measures_ww || (l2 != 0 && !info.raw_gradient);
    w.how = {args.config->grad_factor, l2, info.raw_gradient, weights, args.config->skip != 0};
  }

  LAYERLR_DEVICE void fill_arrays(Work& w, const DeviceSpan& span, const Item& item) {
    const DType dtype = static_cast<DType>(span.dtype);
    const int64_t begin = int64_t(item.number) * item_elements, left = span.size - begin;
    const int param = param_bytes(dtype), state = state_bytes(dtype);
    const double t = coming_step(span.step, span.step_is_double != 0);
    w.dtype = dtype;
    w.scalars = scalars_for(t, F::any && dtype == DType::f64);
    w.at.count = static_cast<int>(left < item_elements ? left : item_elements);
    w.at.w = span.param + begin * param;
    w.at.g = span.grad + begin * param;
    for (int k = 0; k < D<float>::states; ++k) w.at.s[k] = span.state[k] + begin * state;
    w.at.held = span.held;
    if (span.aux) w.at.aux = span.aux + begin * aux_bytes(dtype, span.held);
    if (span.held == Held::stochastic) w.at.key = rounding_key(span.seed, t);
    w.at.place = static_cast<uint32_t>(span.begin + begin);
    w.at.aligned = begins_vectors(w.at, dtype, D<float>::states);
  }

  /// Which scalars are those of step t. The workers may be using the latest, not the others.
  LAYERLR_DEVICE int scalars_for(double t, bool wide) {
    for (int tries = 0; tries < 2; ++tries) {
      const Scalars<D>& s = shared.scalars[latest];
      if (s.t == t && s.wide == wide) return latest;
      latest = 1 - latest;
    }
    latest = 1 - latest;
    __syncwarp();
    if (lane == 0) {
      Scalars<D>& s = shared.scalars[latest];
      if (wide) {
        new (s.room) D<double>(args.config->direction, t);
      } else {
        new (s.room) D<float>(args.config->direction, t);
      }
      s.t = t;
      s.wide = wide;
    }
    __syncwarp();
    return latest;
  }

  // -- verdicts
  // ---------------------------------------------------------------------------------------

  LAYERLR_DEVICE void fill_verdict(Work& w) {
    if (order == unmeasured) {
      const Verdict v = decide(args.rule, layer_config<D<float>>(args, w.layer), {});
      w.a = v.scale.a;
      w.b = v.scale.b;
    } else if (args.phase == whole_step && device::load_acquire(args.ready + w.layer) != epoch) {
      w.waits = true;
    } else {
      read_verdict(w);
    }
  }
  LAYERLR_DEVICE void wait_for_verdict(Work& work) {
    if (lane == 0) {
      device::wait_for(args.ready + work.layer, epoch);
      read_verdict(work);
    }
  }
  LAYERLR_DEVICE void read_verdict(Work& w) {
    const DeviceVerdict* v = args.verdicts + w.layer;
    w.grad = device::read_fresh(&v->grad);
    w.a = device::read_fresh(&v->a);
    w.b = device::read_fresh(&v->b);
    if (device::read_fresh(&v->keep)) {
      w.what = nothing;
      w.sums = false;
    }
  }

  // -- sums
  // -------------------------------------------------------------------------------------------

  /// The item is done: add its sums, and those of its layer if it was the layer's last.
  LAYERLR_DEVICE void finish(const Work& work, const Partials& partials) {
    if (order == unmeasured || !work.sums) return;
    LayerStats sums;
    if (work.what != nothing) {
      sums = add_rows(workers, [&](int row, int column) { return partials.of[row][column]; });
    }
    if (!add_layer(work, sums) || lane != 0) return;
    if (work.pass == second_pass) {
      conclude_step(args, work.layer, sums);
    } else if (args.phase == first_pass) {
      args.layer_sums[work.layer] = sums;
    } else {
      conclude<D<float>>(args, work.layer, sums);
      device::store_release(args.ready + work.layer, epoch);
    }
  }

  /// Put an item's sums into its slot. The last one of a segment adds the segment's, the last
  /// segment the layer's: then `sums` are those, and it is true.
  LAYERLR_DEVICE bool add_layer(const Work& work, LayerStats& sums) {
    const DeviceLayer& layer = args.layer[work.layer];
    const int slots = layer.slots;
    if (slots == 1) return true;
    const int segment = (work.slot - layer.first_slot) / segment_items;
    const int first = segment * segment_items, left = slots - first;
    const int count = left < segment_items ? left : segment_items;
    const int place = layer.first_segment + segment;
    put(args.slot_sums + work.slot, sums);
    if (!is_last(args.segment_arrivals + place, count)) return false;
    sums = add_fresh(args.slot_sums + layer.first_slot + first, count);
    if (slots <= segment_items) return true;
    const int segments = (slots + segment_items - 1) / segment_items;
    put(args.segment_sums + place, sums);
    if (!is_last(args.layer_arrivals + work.layer, segments)) return false;
    sums = add_fresh(args.segment_sums + layer.first_segment, segments);
    return true;
  }
  LAYERLR_DEVICE void put(LayerStats* at, const LayerStats& sums) {
    if (lane == 0) *at = sums;
  }

  /// Arrive at a counter: whether all others of `count` have. What the workers and this lane have
  /// written is seen by whoever is told so.
  LAYERLR_DEVICE bool is_last(uint32_t* counter, int count) {
    bool last = false;
    if (lane == 0) {
      last = device::add_acq_rel(counter, 1) + 1 == static_cast<unsigned>(count);
      if (last) *counter = 0;
    }
    __syncwarp();
    return __shfl_sync(all, static_cast<int>(last), 0) != 0;
  }
};

}  // namespace layerlr
