// The warp of a block that takes tickets and makes items ready for the workers.
#pragma once

#include <new>

#include "cuda/block.cuh"
#include "cuda/layer.cuh"

namespace layerlr {

/// Makes item k ready while the workers are at item k - 1. All lanes do the same but for what only
/// one may do.
template <template <class> class D, class F>
struct Dispatcher {
  static constexpr unsigned all = 0xffffffffu;
  const StepArgs& args;
  Shared<D>& shared;
  const int lane = threadIdx.x % 32;
  const uint32_t epoch;
  const Order order;
  const RuleInfo info;
  const double sign, l2;
  const bool skip;
  int asked;       // the ticket under way, in lane 0
  int latest = 0;  // scalars of the last item that wanted some

  LAYERLR_DEVICE Dispatcher(const StepArgs& args, Shared<D>& shared)
      : args(args),
        shared(shared),
        epoch(args.sync->epoch + 1),
        order(args.order()),
        info(rule_info(args.rule.rule)),
        sign(args.config->grad_factor),
        l2(l2_of(args)),
        skip(args.config->skip != 0),
        asked(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  LAYERLR_DEVICE void run() {
    if (lane == 0) shared.scalars[0].t = shared.scalars[1].t = 0;
    __syncwarp();
    ask();
    for (int k = 0;; ++k) {
      Work& work = shared.work[k & 1];
      prepare(work, next_item());
      meet();  // the workers begin with item k, and have ended the one before
      if (work.what == ends) return;
      ask();
      if (work.waits) {
        wait_for_verdict(work);
        meet();
      }
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
    const Codec weights = static_cast<Codec>(span.weights);
    const Stored states = span.states;
    const int block = span.block;
    const bool ruled = span.ruled;
    const double lr_scale = span.lr_scale;
    const void* const step = span.step;
    const bool step_is_double = span.step_is_double;
    const bool active = __shfl_sync(all, array.data != nullptr, array_g);

    Work w{};
    w.layer = item.layer;
    w.slot = item.slot;
    w.second = args.phase == whole_step ? item.second : args.phase == second_pass;
    w.what = active ? works : nothing;
    w.pass = pass_of(w.second);
    w.sums = sums_up(w.pass);
    w.grad = 1;
    if (order != unmeasured && w.second) fill_verdict(w);
    const double t = active ? coming_step(step, step_is_double) : 0;
    if (order == unmeasured) fill_plain(w, lr_scale, t);
    if (active) w.scalars = scalars_for(t, F::any && dtype == DType::f64);

    const int64_t begin = int64_t(item.number) * args.item_elements, left = size - begin;
    if (array.data) array.data += begin / code_block * array.block_bytes;
    const bool begins = (reinterpret_cast<uintptr_t>(array.data) & (array.vector_bytes - 1)) == 0;
    w.at.aligned = __all_sync(all, begins) && block % 4 == 0;
    w.at.block = block;
    w.at.count = static_cast<int>(left < args.item_elements ? left : args.item_elements);
    w.at.weights = weights;
    w.at.narrow = states == Stored::bfloat16;
    w.at.codes = states == Stored::codes;
    w.at.key = weights == Codec::stochastic ? rounding_key(seed, t) : 0;
    w.at.place = static_cast<uint32_t>(tensor_begin + begin / code_block * block);
    w.at.dtype = dtype;
    const bool raw = ruled && info.raw_gradient;
    w.how = {sign, l2, l2 != 0, raw, (ruled && info.measures_ww) || (l2 != 0 && !raw), skip};
    if (lane == 0) work = w;
    __syncwarp();
    if (lane < arrays) work.at.of[lane] = array.data;
  }

  LAYERLR_DEVICE Pass pass_of(bool second) const {
    if (order == unmeasured) return Pass::advance_apply;
    if (order == gradient_rule) return second ? Pass::advance_apply_measured : Pass::measure;
    return second ? Pass::apply : Pass::advance;
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
    __syncwarp();  // all lanes have looked at the item
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
    if (device::read_fresh(&v->skip)) {
      w.what = nothing;
      w.sums = false;
    }
  }
};

}  // namespace layerlr
