// A plan over tensors of awkward sizes, for drivers that run an engine without torch.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "plan.h"

namespace layerlr {

inline DType state_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// n zeros that end where their allocation ends, so that one read too far is seen; the odd start
/// puts them off every alignment but their own.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  size_t size;  // in bytes
  DType dtype;
  bool codes;  // of 8 bits instead

  Buffer(int64_t n, DType dtype, bool odd, bool codes = false)
      : size(n * (codes ? 1 : param_bytes(dtype))), dtype(dtype), codes(codes) {
    const size_t shift = odd && !codes ? param_bytes(dtype) : 0;
    memory.reset(new char[size + shift]());
    data = memory.get() + shift;
  }
  int64_t numel() const { return codes ? size : size / param_bytes(dtype); }

  double get(int64_t i) const {
    if (codes) return data[i];
    switch (dtype) {
      case DType::f32:
        return at<float>(i);
      case DType::f64:
        return at<double>(i);
      case DType::bf16:
        return widen(at<BFloat16>(i));
      case DType::f16:
        return widen(at<Float16>(i));
    }
    return 0;
  }
  void set(int64_t i, double x) {
    switch (dtype) {
      case DType::f32:
        at<float>(i) = static_cast<float>(x);
        break;
      case DType::f64:
        at<double>(i) = x;
        break;
      case DType::bf16:
        at<BFloat16>(i) = narrow_bf16(static_cast<float>(x));
        break;
      case DType::f16:
        at<Float16>(i) = narrow_f16(static_cast<float>(x));
        break;
    }
  }

 private:
  template <class T>
  T& at(int64_t i) const {
    return reinterpret_cast<T*>(data)[i];
  }
};

struct Shape {
  int64_t size;
  DType dtype;
};

/// Eight tensors in eight layers: 0 and 1 share one, 4 is split in two, 6 is outside.
struct Model {
  Plan plan;
  std::vector<Buffer> buffers;  // of each tensor: w, g, states, count, what is beside w
  std::vector<double> stats, radii;

  /// With `codecs` some arrays have one, otherwise none.
  Model(int direction, int rule, const std::vector<Shape>& shapes, bool codecs = true) {
    const double rule_hyper[rule_count][max_rule_hyper] = {
        {}, {}, {1e-3, 1e-8, 0}, {10, 0, 1e9}, {1e-6, 2},
        {}, {}, {10, 0, 1e9},    {0.5},        {0.9, 0.99, 1e-8}};
    std::mt19937 random(7);
    plan.direction = direction;
    plan.has_rule = rule >= 0;
    if (rule >= 0) plan.rule.rule = static_cast<RuleId>(rule);
    plan.rule.update = rule_info(plan.rule.rule).update;
    std::copy_n(rule_hyper[rule < 0 ? 0 : rule], max_rule_hyper, plan.rule.hyper);
    for (const Shape& shape : shapes) add(shape, random, codecs);
    const int layer_of[] = {0, 0, 1, 2, 3, 5, 6, 7};
    for (int i = 0; i < 8; ++i) {
      if (i == 4) {
        plan.spans.push_back({4, 3, 0, 602});
        plan.spans.push_back({4, 4, 602, shapes[4].size});
      } else {
        plan.spans.push_back({i, layer_of[i], 0, shapes[i].size});
      }
    }
    plan.layers.resize(8);
    radii.assign(8, plan.rule.rule == RuleId::Rated ? 0.7 : 0);
    for (int l = 0; l < 8; ++l) {
      plan.layers[l].ruled = rule >= 0 && l != 6;
      plan.layers[l].lr_scale = 1 + 0.5 * (l % 3);
      plan.layers[l].memory = &radii[l];
      if (plan.rule.rule == RuleId::AdamMini) plan.layers[l].start_radius = 100 * (l + 1);
    }
    stats.assign(8 * columns, 0);
    plan.stats = stats.data();
    plan.finish();
  }

  /// A step's numbers, of which the rule's are set.
  StepConfig config() const {
    StepConfig config;
    std::copy(std::begin(plan.rule.hyper), std::end(plan.rule.hyper), config.rule);
    return config;
  }

  /// What a step may change, to be compared.
  std::string bits() const {
    std::string all;
    for (const Buffer& b : buffers) all.append(b.data, b.size);
    for (const std::vector<double>* v : {&stats, &radii}) {
      all.append(reinterpret_cast<const char*>(v->data()), v->size() * sizeof(double));
    }
    return all;
  }

 private:
  /// Steps are counted in float32 and float64, from 0 or a little above.
  void add(const Shape& shape, std::mt19937& random, bool codecs) {
    const size_t i = plan.tensors.size();
    std::normal_distribution<double> normal;
    Row row;
    const auto buffer = [&](int64_t n, DType dtype) -> Buffer& {
      const bool odd = i % 2 == 1 && (i != 3 || !row.param.data);  // of 3 the weights alone
      return buffers.emplace_back(n, dtype, odd);
    };
    const auto filled = [&] {
      Buffer& b = buffer(shape.size, shape.dtype);
      for (int64_t e = 0; e < shape.size; ++e) b.set(e, normal(random));
      return b.data;
    };
    row.param.data = filled();
    row.grad.data = filled();
    const std::vector<bool> states = states_of(plan.direction);
    for (size_t k = 0; k < states.size(); ++k) {
      add_state(row.state[k], shape, states[k], codecs && shape.dtype != DType::f64);
    }
    row.step_is_double = i % 3 == 1;
    Buffer& count = buffer(1, row.step_is_double ? DType::f64 : DType::f32);
    count.set(0, i % 3);
    row.step = count.data;
    row.dtype = shape.dtype;
    if (codecs && param_bytes(shape.dtype) == 2) {  // all of them; float16 is not for the last
      row.param.codec = static_cast<Codec>(i % (shape.dtype == DType::bf16 ? 4 : 3));
      row.seed = static_cast<int64_t>(i);
      const DType aux = row.param.codec == Codec::master ? DType::f32 : shape.dtype;
      if (row.param.aux_bytes(1, 1, shape.dtype)) row.param.aux = buffer(shape.size, aux).data;
    }
    if (has_scales(row.state[0].codec)) row.block = block_of(shape.size);
    row.coding = coding_of(row);
    plan.tensors.push_back(row);
  }

  /// Elements that share a scale, in tensors of odd sizes a few; 0: no codes.
  static int64_t block_of(int64_t size) {
    for (int64_t block = code_block; size && block > 4; --block) {
      if (size % block == 0) return block;
    }
    return 0;
  }

  /// Codes where the size allows, bfloat16 in tensor 5.
  void add_state(Array& state, const Shape& shape, bool nonnegative, bool coded) {
    const size_t i = plan.tensors.size();
    const int64_t block = i == 4 ? 0 : block_of(shape.size);  // which is split somewhere
    const bool codes = coded && block;
    const bool narrow = coded && !codes && i == 5;
    const DType dtype = narrow ? DType::bf16 : state_of(shape.dtype);
    state.data = buffers.emplace_back(shape.size, dtype, i % 2 == 1, codes).data;
    if (narrow) state.codec = Codec::bfloat16;
    if (!codes) return;
    state.codec = nonnegative ? Codec::unsigned8 : Codec::signed8;
    state.aux = buffers.emplace_back(shape.size / block, DType::f32, i % 2 == 1).data;
  }
};

}  // namespace layerlr
