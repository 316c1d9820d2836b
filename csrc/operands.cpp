#include "operands.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>

namespace layerlr {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::f32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK(false, "layerlr: no kernels for dtype ", t.scalar_type());
  }
}

int64_t elements(const at::Tensor& t) { return t.numel() * (t.is_complex() ? 2 : 1); }

bool is_dense(const at::Tensor& t, bool split) {
  if (t.is_contiguous()) return true;
  if (!t.is_non_overlapping_and_dense() || !holds_elements(t)) return false;
  return !split || t.dim() == 0 || t.stride(0) * t.size(0) == t.numel();
}

void* Staging::pointer(const at::Tensor& t, const at::Tensor& like, bool written) {
  if (holds_elements(t) && (same(t.strides(), like.strides()) || !address(t))) return address(t);
  const at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), t.options());
  copy.copy_(t.detach());
  copies_.push_back({t, copy, written});
  return copy.data_ptr();
}

void Staging::finish() {
  if (copies_.empty()) return;
  for (const Copy& c : copies_) {
    if (c.written) c.original.detach().copy_(c.copy);
  }
  copies_.clear();
}

Codec codec_of_state(caffe2::TypeMeta dtype) {
  if (dtype == caffe2::TypeMeta::Make<int8_t>()) return Codec::signed8;
  if (dtype == caffe2::TypeMeta::Make<uint8_t>()) return Codec::unsigned8;
  if (dtype == caffe2::TypeMeta::Make<at::BFloat16>()) return Codec::bfloat16;
  return Codec::plain;
}

namespace {

/// Index of a name in a list of them.
int index_of(const std::vector<std::string>& names, const std::string& name, const char* what) {
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<int>(i);
    known += (i ? ", " : "") + names[i];
  }
  TORCH_CHECK(false, "layerlr: unknown ", what, " '", name, "', known are ", known);
}

}  // namespace

void configure(Plan& plan, const std::string& direction, const std::string& rule,
               const std::vector<bool>& ruled, at::ArrayRef<double> lr_scale,
               at::ArrayRef<double> start_radius, const at::Tensor& stats) {
  TORCH_CHECK(ruled.size() == lr_scale.size() && ruled.size() == start_radius.size());
  TORCH_CHECK(stats.scalar_type() == at::kDouble && stats.is_contiguous() &&
              stats.numel() == int64_t(ruled.size()) * columns);
  plan.direction = index_of(direction_names(), direction, "direction");
  plan.has_rule = !rule.empty();
  if (plan.has_rule) plan.rule.rule = static_cast<RuleId>(index_of(rule_names(), rule, "rule"));
  plan.rule.update = rule_info(plan.rule.rule).update;
  plan.stats = stats.data_ptr<double>();
  plan.layers.resize(ruled.size());
  for (size_t l = 0; l < ruled.size(); ++l) {
    plan.layers[l].ruled = ruled[l];
    plan.layers[l].lr_scale = lr_scale[l];
    plan.layers[l].start_radius = start_radius[l];
  }
}

Codec codec_of_weights(const std::string& precision) {
  static_assert(int(Codec::stochastic) == 3);
  return static_cast<Codec>(
      index_of({"", "master", "kahan", "stochastic"}, precision, "precision"));
}

Span span_of_rows(const at::Tensor& p, int64_t tensor, int64_t begin, int64_t end, int64_t layer) {
  const int64_t rows = p.dim() ? p.size(0) : 1, row = rows ? elements(p) / rows : 0;
  TORCH_CHECK(0 <= begin && begin <= end && end <= rows);
  return {static_cast<int32_t>(tensor), static_cast<int32_t>(layer), begin * row, end * row};
}

Threads torch_threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            at::parallel_for(0, n, 1, body);
          }};
}

}  // namespace layerlr
