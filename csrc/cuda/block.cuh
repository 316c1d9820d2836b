// What one block does with the tiles that the schedule gives it.
#pragma once

#include <new>
#include <type_traits>

#include "cuda/elements.cuh"

namespace layerlr {

LAYERLR_DEVICE double coming_step(const DeviceRow& row) {
  return 1 + (row.step_is_double ? device::read(static_cast<const double*>(row.step))
                                 : double(device::read(static_cast<const float*>(row.step))));
}

/// What the threads of a block share beside the tiles.
template <template <class> class D>
struct Shared {
  Partials partials;
  DeviceVerdict verdict;
  int last;  // whether this block was the last to arrive
  alignas(D<double>) char single[sizeof(D<float>)];
  alignas(D<double>) char wide[sizeof(D<double>)];
};
template <template <class> class D>
struct Block {
  const StepArgs& args;
  Shared<D>& shared;
  Job* jobs;    // one for each place of the first ring
  char* tiles;  // the two rings
  DeviceConfig config;
  uint32_t epoch;
  double made_for = 0;  // step that the direction's scalars are for
  int verdict_of = -1;  // layer whose verdict is at hand

  LAYERLR_DEVICE Block(const StepArgs& args, Shared<D>& shared, char* dynamic)
      : args(args),
        shared(shared),
        jobs(reinterpret_cast<Job*>(dynamic + args.rings.bytes_of_tiles())),
        tiles(dynamic),
        config(*args.config),
        epoch(args.sync->epoch + 1) {}

  // -- where this block is in its list ------------------------------------------------------------

  struct Cursor {
    int run, end, place;
    Run now;
    Run next;  // asked for a run ahead
    DeviceRow row;
    const char* g;
    double t;
  } cursor;

  LAYERLR_DEVICE void begin() {
    cursor.run = args.first_run[blockIdx.x] - 1;
    cursor.end = args.first_run[blockIdx.x + 1];
    if (cursor.run + 1 < cursor.end) cursor.next = args.runs[cursor.run + 1];
    enter_next();
  }
  LAYERLR_DEVICE void enter_next() {
    do {
      if (++cursor.run == cursor.end) return;
      cursor.now = cursor.next;
      if (cursor.run + 1 < cursor.end) cursor.next = args.runs[cursor.run + 1];
    } while (!takes(cursor.now.kind));
    if (args.phase != whole_step) cursor.now.kind = args.phase;
    cursor.place = 0;
    cursor.row = args.rows[cursor.now.tensor];
    cursor.g = args.grads[cursor.now.tensor];
    cursor.t = cursor.g ? coming_step(cursor.row) : 0;  // a row without gradient may be empty
  }
  /// Whether this launch has to do with tiles of a kind. Those that a whole step holds are streamed
  /// by a first pass, and read again by a second.
  LAYERLR_DEVICE bool takes(int32_t kind) const {
    if (args.phase == first_pass) return kind != again || !args.measured;
    return args.phase == whole_step || kind != stream;
  }
  LAYERLR_DEVICE bool more() const { return cursor.run != cursor.end; }
  LAYERLR_DEVICE void advance() {
    if (++cursor.place == cursor.now.count) enter_next();
  }

  // -- memory -----------------------------------------------------------------------------------

  /// Place of array k (w, g, states) of job j.
  LAYERLR_DEVICE char* place(int j, int k) const {
    const Rings& r = args.rings;
    const int ring = r.ring[k];
    return tiles + (ring ? r.bytes[0] * r.places[0] : 0) + r.bytes[ring] * (j % r.places[ring]) +
           r.offset[k];
  }

  /// Call body(P()) with the parameter type.
  template <class Body>
  LAYERLR_DEVICE static void with_type(int dtype, Body body) {
    switch (static_cast<DType>(dtype)) {
      case DType::f32:
        return body(float());
      case DType::f64:
        return body(double());
      case DType::bf16:
        return body(BFloat16());
      case DType::f16:
        return body(Float16());
    }
  }

  /// Gradient rules that measure only, and update rules that read again, need not all.
  LAYERLR_DEVICE bool needs_w(Kind kind) const {
    const RuleInfo info = rule_of(cursor.now.ruled);
    return args.rule.update || kind != stream || info.measures_ww ||
           (l2() != 0 && !info.raw_gradient);
  }
  LAYERLR_DEVICE bool needs_g(Kind kind) const {
    return !args.rule.update || kind != again || D<float>::needs_grad;
  }
  LAYERLR_DEVICE bool needs_s(Kind kind) const { return args.rule.update || kind != stream; }

  /// Ask for the tile under the cursor, as job j, and move on.
  LAYERLR_DEVICE void fetch_next(int j) {
    const Run& run = cursor.now;
    const DeviceRow& row = cursor.row;
    const int64_t each = tile_elements(static_cast<DType>(row.dtype));
    const int64_t begin = run.begin + int64_t(cursor.place) * run.stride * each;
    const int64_t left = run.end - begin;
    const int count = static_cast<int>(left < each ? left : each);
    const bool ends = cursor.place == run.count - 1;
    const Kind kind = static_cast<Kind>(run.kind);
    if (cursor.g) {
      const int param = param_bytes(static_cast<DType>(row.dtype));
      const int state = state_bytes(static_cast<DType>(row.dtype));
      if (needs_w(kind)) fetch(place(j, 0), row.param + begin * param, count * param);
      if (needs_g(kind)) fetch(place(j, 1), cursor.g + begin * param, count * param);
      if (needs_s(kind)) {
        for (int k = 0; k < D<float>::states; ++k) {
          fetch(place(j, 2 + k), row.state[k] + begin * state, count * state);
        }
      }
    }
    if (threadIdx.x == 0) {
      jobs[j % args.rings.places[0]] = {cursor.g,
                                        run.tile + int64_t(cursor.place) * run.stride,
                                        begin,
                                        count,
                                        run.tensor,
                                        run.layer,
                                        run.segment,
                                        kind,
                                        run.ruled != 0,
                                        ends && run.measured,
                                        ends && run.applied,
                                        cursor.t};
    }
    advance();
  }

  LAYERLR_DEVICE const Job& job(int j) const { return jobs[j % args.rings.places[0]]; }

  /// Call body(tile) with the typed tile of job j.
  template <class Body>
  LAYERLR_DEVICE void with_tile(int j, Body body) {
    const Job& job = this->job(j);
    const DeviceRow& row = args.rows[job.tensor];
    make_direction(job.t);
    const RuleInfo info = rule_of(job.ruled);
    const Gradient how{config.grad_factor, l2(), info.raw_gradient, info.measures_ww,
                       config.skip != 0};
    with_type(row.dtype, [&](auto p) {
      using P = decltype(p);
      using T = typename Wide<P>::type;
      Arrays at;
      at.count = job.count;
      at.w = place(j, 0) + shift(row.param + job.begin * sizeof(P));
      at.g = place(j, 1) + shift(job.g + job.begin * sizeof(P));
      for (int k = 0; k < D<T>::states; ++k) {
        at.s[k] = place(j, 2 + k) + shift(row.state[k] + job.begin * sizeof(T));
      }
      at.held = row.held;
      if (row.extra) {
        const int each = row.held == Held::master ? sizeof(T) : sizeof(P);
        at.extra = row.extra + job.begin * each;
      }
      if (row.held == Held::stochastic) at.key = rounding_key(row.seed, job.t);
      at.place = static_cast<uint32_t>(job.begin);
      at.u = args.rings.u_is_g ? at.g : place(j, 0) + args.rings.u_offset;
      const void* room = sizeof(T) == 8 ? shared.wide : shared.single;
      body(Tile<D, P>(at, *static_cast<const D<T>*>(room), how));
    });
  }

  LAYERLR_DEVICE RuleInfo rule_of(bool ruled) const {
    return rule_info(ruled ? args.rule.rule : RuleId::Plain);
  }
  LAYERLR_DEVICE double l2() const { return args.raw ? 0 : config.l2; }

  /// Form the direction's scalars for step t; all threads ask for the same.
  LAYERLR_DEVICE void make_direction(double t) {
    if (t == made_for) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      new (shared.single) D<float>(config.direction, t);
      new (shared.wide) D<double>(config.direction, t);
    }
    __syncthreads();
    made_for = t;
  }

  // -- the two passes ---------------------------------------------------------------------------

  /// First pass over job j, which has landed.
  LAYERLR_DEVICE void measure(int j) {
    const Job job = this->job(j);
    if (!args.rule.update && job.kind == again) return;
    LayerStats sums;
    if (job.g) {
      with_tile(j, [&](const auto& tile) {
        if (!args.rule.update) {
          sums = tile.measure();
        } else if (job.kind == again) {
          tile.direction();
        } else {
          sums = tile.advance();
        }
      });
    }
    if (job.kind == again) return;
    sum_warp(sums, shared.partials);
    __syncthreads();
    publish(job);
    if (args.rule.update && job.g) drain_state(j, job);
  }

  /// Write the sums of a tile, which lie in shared memory.
  LAYERLR_DEVICE void publish(const Job& job) {
    if (threadIdx.x < 4) {
      double* to = reinterpret_cast<double*>(args.tile_sums + job.tile);
      to[threadIdx.x] = sum_warps(shared.partials, threadIdx.x);
    }
  }

  LAYERLR_DEVICE void drain_state(int j, const Job& job) {
    const DeviceRow& row = args.rows[job.tensor];
    const int bytes = state_bytes(static_cast<DType>(row.dtype));
    for (int k = 0; k < D<float>::states; ++k) {
      drain(place(j, 2 + k), row.state[k] + job.begin * bytes, job.count * bytes);
    }
  }

  /// Second pass over job j, by the verdict at hand.
  LAYERLR_DEVICE void apply(int j) {
    const Job job = this->job(j);
    if (job.kind == stream || !job.g || shared.verdict.keep) return;
    const LayerScale scale{shared.verdict.grad, shared.verdict.a, shared.verdict.b, 1};
    LayerStats sums;
    with_tile(j, [&](const auto& tile) {
      if (args.rule.update) {
        tile.apply(scale);
      } else {
        sums = tile.advance_apply(scale);
      }
    });
    const bool tells = args.measured && !args.rule.update;
    if (tells) {
      __syncthreads();  // the sums before these have been read
      sum_warp(sums, shared.partials);
    }
    __syncthreads();
    if (tells) publish(job);
    const DeviceRow& row = args.rows[job.tensor];
    const int bytes = param_bytes(static_cast<DType>(row.dtype));
    drain(place(j, 0), row.param + job.begin * bytes, job.count * bytes);
    if (!args.rule.update) drain_state(j, job);
  }

  // -- layers -----------------------------------------------------------------------------------

  /// Arrive at a counter; true in all threads of the block that was the last of `blocks`.
  LAYERLR_DEVICE bool arrive(uint32_t* counter, unsigned blocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.last = device::add_acq_rel(counter, 1) + 1 == blocks;
      if (shared.last) *counter = 0;
    }
    __syncthreads();
    return shared.last;
  }

  /// The block has done its whole part of a segment: sum it if it was the last, and the layer if
  /// that was the last segment. True where `sums` is the layer's.
  LAYERLR_DEVICE bool complete(int segment, LayerStats& sums) {
    const Segment& s = args.segment[segment];
    const DeviceLayer& layer = args.layer[s.layer];
    uint32_t* counter = args.segment_arrivals + segment;
    int blocks = s.blocks, count = s.tiles;
    const LayerStats* entries = args.tile_sums + s.first_tile;
#pragma unroll 1
    for (bool all = layer.segments == 1;; all = true) {
      if (!arrive(counter, blocks)) return false;
      sums = sum_entries(entries, count, shared.partials);
      if (all) return true;
      if (threadIdx.x == 0) args.segment_sums[segment] = sums;
      counter = args.layer_arrivals + s.layer;
      blocks = count = layer.segments;
      entries = args.segment_sums + layer.first_segment;
    }
  }

  /// What decide() wants to know of a layer.
  LAYERLR_DEVICE LayerConfig layer_config(int l) const {
    const DeviceLayer& layer = args.layer[l];
    const DevicePresence present = args.presence[l];
    const double t = present.first < 0 ? 1 : coming_step(args.rows[present.first]);
    const double lr = config.lr * layer.lr_scale * D<double>::rate(config.direction, t);
    return {layer.ruled != 0,
            lr,
            l2(),
            config.decoupled_decay,
            D<float>::first_order,
            config.skip != 0,
            args.kept[l],
            present.whole != 0};
  }

  /// One thread: from the sums of layer l to its verdict and its row of statistics.
  LAYERLR_DEVICE void conclude(int l, const LayerStats& sums) {
    const LayerConfig c = layer_config(l);
    const Verdict v = decide(args.rule, c, sums);
    args.verdicts[l] = {v.scale.grad, v.scale.a, v.scale.b, v.skip};
    if (args.presence[l].first >= 0) write_row(args.stats + int64_t(l) * columns, v, c.lr);
  }

  /// One thread: a gradient rule's step is known after the second pass only.
  LAYERLR_DEVICE void conclude_step(int l, const LayerStats& sums) {
    if (args.presence[l].first >= 0) write_step(args.stats + int64_t(l) * columns, sums);
  }

  /// Have the verdict of layer l at hand; where blocks run side by side, wait for it.
  LAYERLR_DEVICE void get_verdict(int l, bool waits) {
    if (l == verdict_of) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      if (!args.measured) {
        const Verdict v = decide(args.rule, layer_config(l), {});
        shared.verdict = {v.scale.grad, v.scale.a, v.scale.b, 0};
      } else {
        while (waits && device::load_acquire(args.ready + l) != epoch) {
        }
        const DeviceVerdict* v = args.verdicts + l;
        shared.verdict = {device::read_fresh(&v->grad), device::read_fresh(&v->a),
                          device::read_fresh(&v->b), device::read_fresh(&v->keep)};
      }
    }
    __syncthreads();
    verdict_of = l;
  }

  /// Step counts, by the last block of all: a tensor's stands still where all its layers were left
  /// alone.
  LAYERLR_DEVICE void advance_counts() {
    for (int i = threadIdx.x; i < args.tensors; i += tile_threads) {
      if (!args.grads[i]) continue;
      const DeviceRow& row = args.rows[i];
      bool kept = args.measured;
      for (int k = 0; k < row.layers && kept; ++k) {
        kept = device::read_fresh(&args.verdicts[args.tensor_layers[row.first_layer + k]].keep);
      }
      if (kept) continue;
      if (row.step_is_double) {
        *static_cast<double*>(row.step) += 1;
      } else {
        *static_cast<float*>(row.step) += 1;
      }
    }
  }
};

}  // namespace layerlr
