// A block: workers, who do what is to be done to elements, a warp that takes tickets for them and a
// warp that adds their sums.
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
  bool second;  // the pass
  bool sums;    // there are sums to add, of nothing perhaps
  int scalars;  // which of the block's two
  int layer, slot;
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

// -- workers --

/// Dtypes that a kernel knows. with_type calls body(P(), whether weights may have something
/// beside).
template <class P, bool may_be_coded>
struct Only {
  static constexpr bool any = false, coded = may_be_coded;
  template <class Body>
  LAYERLR_DEVICE static void with_type(DType, Body body) {
    body(P(), std::bool_constant<may_be_coded>());
  }
};
struct AnyDtype {
  static constexpr bool any = true, coded = true;
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

/// What a worker does, item after item. The next one is prepared, and the sums of the last one are
/// added, by the two other warps in the meantime.
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

// -- the warp that takes tickets --

/// Makes item k + 1 ready while the workers are at item k. All lanes do the same but for what only
/// one may do.
template <template <class> class D, class F, Order order>
struct Dispatcher {
  static constexpr unsigned all = 0xffffffffu;
  const StepArgs& args;
  Shared<D>& shared;
  const int lane = threadIdx.x % 32;
  const uint32_t epoch;
  const RuleInfo info;
  const double sign, l2;
  const bool skip;
  int asked;       // the ticket under way, in lane 0
  int latest = 0;  // scalars of the last item that wanted some

  LAYERLR_DEVICE Dispatcher(const StepArgs& args, Shared<D>& shared)
      : args(args),
        shared(shared),
        epoch(args.sync->epoch + 1),
        info(rule_info(args.rule.rule)),
        sign(args.config->grad_factor),
        l2(l2_of(args)),
        skip(args.config->skip != 0),
        asked(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  LAYERLR_DEVICE void run() {
    if (lane == 0) shared.scalars[0].t = shared.scalars[1].t = 0;
    __syncwarp();
    ask();
    prepare(shared.work[0], next_item());
    for (int k = 0;; ++k) {
      Work& now = shared.work[k & 1];
      meet();  // the workers begin with item k, and have ended the one before
      const bool end = now.what == ends;
      if (!end) ask();
      if (now.waits) {
        wait_for_verdict(now);
        meet();
      }
      if (end) return;
      prepare(shared.work[~k & 1], next_item());
    }
  }

  // -- tickets --

  /// Ask for a ticket. Where both passes are in one launch tickets come from a counter: an item
  /// waits for nothing but items before it, and the blocks that took those are running.
  LAYERLR_DEVICE void ask() {
    if (args.phase != whole_step) {
      asked += static_cast<int>(gridDim.x);
    } else if (lane == 0) {
      asked = static_cast<int>(device::add_relaxed(&args.sync->ticket, 1));
    }
  }

  /// The item of the ticket that was asked for, or of the next that this launch has to do with; its
  /// span is -1 where none is left.
  LAYERLR_DEVICE Item next_item() {
    for (;; ask()) {
      const int ticket = __shfl_sync(all, asked, 0);
      if (ticket >= args.items) return {-1, 0, 0, 0, 0};
      const Item item = args.item[ticket];
      if (!args.measured || args.phase == whole_step ||
          (args.phase == second_pass) == static_cast<bool>(item.second)) {
        return item;
      }
    }
  }

  // -- an item to come --

  LAYERLR_DEVICE void prepare(Work& work, const Item& item) {
    if (item.span < 0) {
      if (lane == 0) {
        work.what = ends;
        work.waits = false;
      }
      return;
    }
    // What it takes is asked for before any of it is used.
    const DeviceSpan& span = args.spans[item.span];
    DeviceArray array{nullptr, 0, 1};
    if (lane < arrays) array = span.array[lane];
    const DType dtype = static_cast<DType>(span.dtype);
    const int64_t size = span.size, tensor_begin = span.begin, seed = span.seed;
    const Held held = span.held;
    const bool ruled = span.ruled;
    const double lr_scale = span.lr_scale;
    const void* const step = span.step;
    const bool step_is_double = span.step_is_double;
    const bool active = __shfl_sync(all, array.data != nullptr, array_g);

    Work w{};
    w.layer = item.layer;
    w.slot = item.slot;
    w.second = args.phase == whole_step ? item.second : args.phase == second_pass;
    w.what = !active ? nothing : w.second ? applies : measures;
    w.sums = order == gradient_rule || (order == update_rule && !w.second);
    w.grad = 1;
    if (order != unmeasured && w.second) fill_verdict(w);
    const double t = active ? coming_step(step, step_is_double) : 0;
    if (order == unmeasured) fill_plain(w, lr_scale, t);
    if (active) w.scalars = scalars_for(t, F::any && dtype == DType::f64);

    const int64_t begin = int64_t(item.number) * args.item_elements, left = size - begin;
    if (array.data) array.data += begin * array.element_bytes;
    const bool begins = (reinterpret_cast<uintptr_t>(array.data) & (array.vector_bytes - 1)) == 0;
    w.at.aligned = __all_sync(all, begins);
    w.at.count = static_cast<int>(left < args.item_elements ? left : args.item_elements);
    w.at.held = held;
    w.at.key = held == Held::stochastic ? rounding_key(seed, t) : 0;
    w.at.place = static_cast<uint32_t>(tensor_begin + begin);
    w.dtype = dtype;
    const bool raw = ruled && info.raw_gradient;
    w.how = {sign, l2, raw, (ruled && info.measures_ww) || (l2 != 0 && !raw), skip};
    if (lane == 0) work = w;
    __syncwarp();
    if (lane < arrays) work.at.of[lane] = array.data;
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

  // -- verdicts --

  /// Nothing is measured: the step of the direction itself.
  LAYERLR_DEVICE void fill_plain(Work& w, double lr_scale, double t) {
    const DeviceConfig& c = *args.config;
    const double lr = c.lr * lr_scale * D<float>::rate(c.direction, t);
    const LayerConfig layer{false, lr,      l2,  c.decoupled_decay, D<float>::first_order,
                            false, nullptr, true};
    const Verdict v = decide({}, layer, {});
    w.a = v.scale.a;
    w.b = v.scale.b;
  }
  LAYERLR_DEVICE void fill_verdict(Work& w) {
    w.waits = args.phase == whole_step && device::load_acquire(args.ready + w.layer) != epoch;
    if (!w.waits) read_verdict(w);
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
};

// -- the warp that adds sums --

/// Adds the sums of item k - 1 while the workers are at item k, and decides on layers. All lanes do
/// the same but for what only one may do.
template <template <class> class D>
struct Adder {
  static constexpr unsigned all = 0xffffffffu;
  const StepArgs& args;
  Shared<D>& shared;
  const int lane = threadIdx.x % 32;
  const uint32_t epoch;

  LAYERLR_DEVICE Adder(const StepArgs& args, Shared<D>& shared)
      : args(args), shared(shared), epoch(args.sync->epoch + 1) {}

  struct Done {
    int layer, slot;
    bool second, sums, active;
  };

  LAYERLR_DEVICE void run() {
    Done done{};
    for (int k = 0;; ++k) {
      const Work& now = shared.work[k & 1];
      meet();
      if (done.sums) finish(done, shared.partials[~k & 1]);
      if (now.waits) meet();  // for what is finished by now, perhaps
      if (now.what == ends) return;
      done = {now.layer, now.slot, now.second, now.sums, now.what != nothing};
    }
  }

  LAYERLR_DEVICE void finish(const Done& done, const Partials& partials) {
    const DeviceLayer layer = args.layer[done.layer];
    const bool decides = !done.second && args.phase == whole_step;
    LayerConfig config;
    if (decides) config = layer_config<D<float>>(args, layer, done.layer);
    LayerStats sums;
    if (done.active) {
      sums = add_rows(workers, [&](int row, int column) { return partials.of[row][column]; });
    }
    if (!add_layer(layer, done, sums) || lane != 0) return;
    if (decides) {
      conclude(args, config, done.layer, sums);
      device::store_release(args.ready + done.layer, epoch);
    } else if (done.second) {
      conclude_step(args, done.layer, sums);
    } else {
      args.layer_sums[done.layer] = sums;
    }
  }

  /// Put an item's sums into its slot. The last one of a segment adds the segment's, the last
  /// segment the layer's: then `sums` are those, and it is true.
  LAYERLR_DEVICE bool add_layer(const DeviceLayer& layer, const Done& done, LayerStats& sums) {
    const int slots = layer.slots;
    if (slots == 1) return true;
    const int segment = (done.slot - layer.first_slot) / segment_items;
    const int first = segment * segment_items, left = slots - first;
    const int count = left < segment_items ? left : segment_items;
    const int place = layer.first_segment + segment;
    if (lane == 0) args.slot_sums[done.slot] = sums;
    if (!is_last(args.segment_arrivals + place, count)) return false;
    sums = add_fresh(args.slot_sums + layer.first_slot + first, count);
    if (slots <= segment_items) return true;
    const int segments = (slots + segment_items - 1) / segment_items;
    if (lane == 0) args.segment_sums[place] = sums;
    if (!is_last(args.layer_arrivals + done.layer, segments)) return false;
    sums = add_fresh(args.segment_sums + layer.first_segment, segments);
    return true;
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
