#include "bound_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace layerlr {

Snapshot::Snapshot(const py::dict& dict) : version_(version_of(dict.ptr())) {
  for (const auto& [key, value] : dict) {
    items_.push_back(py::reinterpret_borrow<py::object>(key));
    items_.push_back(py::reinterpret_borrow<py::object>(value));
  }
}

bool Snapshot::holds_the_same(PyObject* dict) const {
  if (PyDict_GET_SIZE(dict) * 2 != Py_ssize_t(items_.size())) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    if (items_[i].ptr() != key || items_[i + 1].ptr() != value) return false;
  }
  return true;
}

Known::Known(const py::object& param, const py::object& state) : param_(param), state_(state) {
  if (!state.is_none()) snapshot_.emplace(py::reinterpret_borrow<py::dict>(state));
  forms_ = forms();
}

std::vector<Known::Form> Known::forms() const {
  std::vector<Form> found;
  const auto add = [&](PyObject* x) {
    if (!THPVariable_Check(x)) return;
    const at::Tensor& t = THPVariable_Unpack(x);
    found.push_back({t.dtype(), at::DimVector(t.sizes().begin(), t.sizes().end()), t.device(),
                     t.key_set(), is_writable(t)});
  };
  add(param_.ptr());
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (snapshot_ && PyDict_Next(state_.ptr(), &at, &key, &value)) add(value);
  return found;
}

bool same_objects(const py::list& x, const py::list& y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (PyList_GET_ITEM(x.ptr(), i) != PyList_GET_ITEM(y.ptr(), i)) return false;
  }
  return true;
}

BoundPlan::BoundPlan(const PlanSpec& spec)
    : params_(spec.params),
      states_(spec.states),
      stats_(spec.stats),
      device_(stats_.device()),
      n_states_(static_cast<int>(spec.keys.size())),
      weights_(codec_of_weights(spec.precision)) {
  configure(plan_, spec.direction, spec.rule.value_or(""), spec.ruled, spec.lr_scale,
            spec.start_radius, stats_);
  plan_.tensors.resize(params_.size());
  tensors_.resize(params_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) find_values(i, spec);
  read_layouts(spec.spans);
}

namespace {

constexpr const char* two_threads =
    "layerlr: two threads step one optimizer at once: give each an optimizer of its own, or a lock";

/// Whether a number is one of steps.
bool is_count(double t) {
  return t >= 0 && t < 0x1p53 && t == static_cast<double>(static_cast<int64_t>(t));
}

}  // namespace

BoundPlan::Use::Use(BoundPlan& plan) : plan_(plan) {
  TORCH_CHECK(plan.prepared_ && !plan.used_, two_threads);
  plan.used_ = true;
}

void BoundPlan::forget() {
  TORCH_CHECK(!used_, two_threads);
  prepared_ = false;
  staging_ = {};
}

// Flattened, as torch's getters are calls where the compiler has room for none: 250 instructions a
// tensor.
[[gnu::flatten]] int BoundPlan::prepare() {
  forget();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const int answer = look_up(i);
    if (answer != ready) return answer;
  }
  for (const Leader& r : leaders_) {
    double*& memory = plan_.layers[r.layer].memory = nullptr;
    Tensor& t = tensors_[r.tensor];
    if (!t.memory) continue;
    if (!t.snapshot->matches(t.state)) return stale;  // though it may have no gradient
    const at::Tensor& x = THPVariable_Unpack(t.memory);
    if (x.numel() <= r.place || !holds_numbers(x, at::kDouble)) return stale;
    memory = static_cast<double*>(address(x, x.numel()));
    if (memory) {
      memory += r.place;
    } else if (plan_.tensors[r.tensor].active() && !x.is_meta()) {
      return r.tensor;
    }
  }
  prepared_ = true;
  return ready;
}

void BoundPlan::find_values(size_t i, const PlanSpec& spec) {
  Tensor& t = tensors_[i];
  Row& row = plan_.tensors[i];
  t.param = PyList_GET_ITEM(params_.ptr(), i);
  t.state = PyList_GET_ITEM(states_.ptr(), i);
  if (t.state == Py_None) {
    t.state = nullptr;
    return;
  }
  const auto get = [&](const std::string& key) {
    return PyDict_GetItemString(t.state, key.c_str());
  };
  t.snapshot.emplace(py::reinterpret_borrow<py::dict>(t.state));
  for (int k = 0; k < n_states_; ++k) {
    t.values[k] = get(spec.keys[k]);
    const at::Tensor& value = THPVariable_Unpack(t.values[k]);
    t.state_dtypes[k] = value.dtype();
    row.state[k].codec = codec_of_state(value.dtype());
    if (!has_scales(row.state[k].codec)) continue;
    t.scales[k] = get(spec.aux_keys[k]);
    const at::Tensor& scales = THPVariable_Unpack(t.scales[k]);
    t.scale_sizes = scales.sizes();
    if (scales.numel()) row.block = value.numel() / scales.numel();
  }
  t.step = get("step");
  if (spec.memory_key) t.memory = get(*spec.memory_key);
  if (weights_ != Codec::plain && THPVariable_Unpack(t.param).element_size() == 2) {
    t.weights_aux = get(spec.weights_aux_key);
    row.param.codec = weights_;
  }
  t.step_dtype = THPVariable_Unpack(t.step).dtype();
  row.step_is_double = t.step_dtype == caffe2::TypeMeta::Make<double>();
  row.coding = coding_of(row);
}

void BoundPlan::read_layouts(const std::vector<std::array<int64_t, 4>>& spans) {
  std::vector<int> parts(tensors_.size()), place(tensors_.size());
  std::vector<char> led(plan_.layers.size());
  for (const auto& span : spans) ++parts[span[0]];
  for (const auto& [tensor, begin, end, layer] : spans) {
    Tensor& t = tensors_[tensor];
    const at::Tensor& p = THPVariable_Unpack(t.param);
    t.contiguous = p.is_contiguous();
    t.dense = is_dense(p, parts[tensor] > 1);
    if (!t.scale_sizes.empty()) t.dense = t.contiguous;  // codes have one order
    t.plain = t.dense && p.layout() == at::kStrided && holds_elements(p);
    t.keys = p.key_set();
    t.dtype = p.dtype();
    t.sizes.assign(p.sizes().begin(), p.sizes().end());
    t.strides.assign(p.strides().begin(), p.strides().end());
    plan_.tensors[tensor].dtype = dtype_of(p);
    plan_.spans.push_back(span_of_rows(p, tensor, begin, end, layer));
    const int at = place[tensor]++;
    if (led[layer] || !t.state || !plan_.layers[layer].ruled) continue;
    leaders_.push_back({int(layer), int(tensor), at});
    led[layer] = 1;
  }
}

bool BoundPlan::holds_scales(const Tensor& t, int k) const {
  const at::Tensor &codes = THPVariable_Unpack(t.values[k]), &x = THPVariable_Unpack(t.scales[k]);
  return codes.is_contiguous() && holds_numbers(x, at::kFloat) && same(x.sizes(), t.scale_sizes);
}

int BoundPlan::look_up(size_t i) {
  Tensor& t = tensors_[i];
  Row& row = plan_.tensors[i];
  row.grad.data = nullptr;
  const at::Tensor& p = THPVariable_Unpack(t.param);
  const at::Tensor& g = p.unsafeGetTensorImpl()->grad();
  if (!g.defined()) return ready;
  if (!t.state || !t.snapshot->matches(t.state)) return stale;

  at::Tensor like;    // undefined as long as all lie in memory as the parameter should
  bool there = true;  // whether all have memory
  const auto point = [&](void*& to, const at::Tensor& x, caffe2::TypeMeta wanted, bool written) {
    if (lies_as_planned(t, *x.unsafeGetTensorImpl(), wanted)) {
      to = address(x, x.numel());
    } else {
      if (!holds(t, x, wanted) || (written && !is_writable(x))) return false;
      if (!like.defined()) like = t.dense ? p : at::empty(p.sizes(), p.options());
      to = staging_.pointer(x, like, written);
    }
    there = there && to;
    return true;
  };
  if (!point(row.param.data, p, t.dtype, true)) return stale;
  if (like.defined() && !same(p.strides(), t.strides)) return stale;
  const at::Tensor& step = THPVariable_Unpack(t.step);
  if (step.numel() != 1 || step.dtype() != t.step_dtype || step.device() != device_ ||
      !holds_elements(step)) {
    return stale;
  }
  row.step = address(step);
  if (row.step && device_.is_cpu() && !is_count(row.count())) return stale;
  for (int k = 0; k < n_states_; ++k) {
    const at::Tensor& x = THPVariable_Unpack(t.values[k]);
    if (!point(row.state[k].data, x, t.state_dtypes[k], true)) return stale;
    if (!t.scales[k]) continue;
    if (!holds_scales(t, k)) return stale;
    const at::Tensor& scales = THPVariable_Unpack(t.scales[k]);
    row.state[k].aux = address(scales, scales.numel());
    there = there && row.state[k].aux;
  }
  if (t.weights_aux) {
    const at::Tensor& x = THPVariable_Unpack(t.weights_aux);
    if (weights_ == Codec::stochastic) {
      if (x.scalar_type() != at::kLong || x.numel() != 1 || !x.is_cpu()) return stale;
      if (!is_writable(x)) return stale;
      const auto* const seed = static_cast<const int64_t*>(address(x));
      if (!seed) return static_cast<int>(i);
      row.seed = *seed;
    } else {
      const bool wide = weights_ == Codec::master;
      const caffe2::TypeMeta wanted = wide ? caffe2::TypeMeta::Make<float>() : t.dtype;
      if (!point(row.param.aux, x, wanted, true)) return stale;
    }
  }
  if (!point(row.grad.data, g, t.dtype, false)) return static_cast<int>(i);
  if (g.numel() == 0) row.grad.data = row.step;  // it has no memory, but it is one
  return (there && row.step) || p.numel() == 0 || p.is_meta() ? int(ready) : static_cast<int>(i);
}

[[gnu::flatten]] void BoundPlan::finish() {
  prepared_ = false;
  staging_.finish();
  const auto bump = [](PyObject* value) {
    c10::TensorImpl& t = *THPVariable_Unpack(value).unsafeGetTensorImpl();
    if (t.version_counter().enabled()) t.bump_version();  // an inference tensor's is not
  };
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Row& row = plan_.tensors[i];
    const Tensor& t = tensors_[i];
    if (!row.active()) continue;
    bump(t.param);
    for (int k = 0; k < n_states_; ++k) {
      bump(t.values[k]);
      if (t.scales[k]) bump(t.scales[k]);
    }
    if (row.param.aux && weights_ != Codec::stochastic) bump(t.weights_aux);
  }
}

at::Tensor BoundPlan::rows() const {
  const int64_t n = plan_.tensors.size(), size = sizeof(Row) / sizeof(int64_t);
  const at::Tensor answer = at::empty({n, size}, at::kLong);
  if (n) std::memcpy(answer.data_ptr(), plan_.tensors.data(), n * sizeof(Row));
  return answer;
}

at::Tensor BoundPlan::memory_pointers() const {
  const at::Tensor answer = at::zeros({int64_t(plan_.layers.size())}, at::kLong);
  int64_t* to = answer.data_ptr<int64_t>();
  for (const Layer& layer : plan_.layers) *to++ = reinterpret_cast<int64_t>(layer.memory);
  return answer;
}

}  // namespace layerlr
