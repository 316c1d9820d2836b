#include "live_plan.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

namespace layerlr {

Snapshot::Snapshot(const py::dict& dict) {
  for (const auto& [key, value] : dict) {
    items_.push_back(py::reinterpret_borrow<py::object>(key));
    items_.push_back(py::reinterpret_borrow<py::object>(value));
  }
}

bool Snapshot::matches(PyObject* dict) const {
  if (PyDict_GET_SIZE(dict) * 2 != Py_ssize_t(items_.size())) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    if (items_[i].ptr() != key || items_[i + 1].ptr() != value) return false;
  }
  return true;
}

bool same_objects(const py::list& x, const py::list& y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (PyList_GET_ITEM(x.ptr(), i) != PyList_GET_ITEM(y.ptr(), i)) return false;
  }
  return true;
}

LivePlan::LivePlan(py::list params, py::list states, const std::vector<std::string>& keys,
                   const std::vector<std::array<int64_t, 4>>& spans, const std::vector<bool>& ruled,
                   const std::vector<double>& lr_scale, const std::vector<double>& start_radius,
                   const std::string& direction, const std::optional<std::string>& rule,
                   const std::optional<std::string>& memory_key, at::Tensor stats,
                   const std::string& precision, const std::string& extra_key)
    : params_(std::move(params)),
      states_(std::move(states)),
      stats_(std::move(stats)),
      device_(stats_.device()),
      n_states_(static_cast<int>(keys.size())),
      held_(held_by_name(precision)) {
  configure(plan_, direction, rule.value_or(""), ruled, lr_scale, start_radius, stats_);
  plan_.tensors.resize(params_.size());
  tensors_.resize(params_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) find_values(i, keys, memory_key, extra_key);
  read_layouts(spans);
}

int LivePlan::prepare() {
  staging_ = {};
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const int answer = look_up(i);
    if (answer != ready) return answer;
  }
  for (const Leader& r : leaders_) {
    PyObject* value = tensors_[r.tensor].memory;
    if (value && THPVariable_Unpack(value).numel() <= r.place) return stale;
    plan_.layers[r.layer].memory =
        value ? THPVariable_Unpack(value).data_ptr<double>() + r.place : nullptr;
  }
  return ready;
}

void LivePlan::find_values(size_t i, const std::vector<std::string>& keys,
                           const std::optional<std::string>& memory_key,
                           const std::string& extra_key) {
  Tensor& t = tensors_[i];
  t.param = PyList_GET_ITEM(params_.ptr(), i);
  t.state = PyList_GET_ITEM(states_.ptr(), i);
  if (t.state == Py_None) {
    t.state = nullptr;
    return;
  }
  const auto get = [&](const char* key) { return PyDict_GetItemString(t.state, key); };
  t.snapshot.emplace(py::reinterpret_borrow<py::dict>(t.state));
  for (int k = 0; k < n_states_; ++k) t.values[k] = get(keys[k].c_str());
  t.step = get("step");
  if (memory_key) t.memory = get(memory_key->c_str());
  if (held_ != Held::nearest && THPVariable_Unpack(t.param).element_size() == 2) {
    t.extra = get(extra_key.c_str());
  }
  t.step_dtype = THPVariable_Unpack(t.step).dtype();
  if (n_states_) t.state_dtype = THPVariable_Unpack(t.values[0]).dtype();
}

void LivePlan::read_layouts(const std::vector<std::array<int64_t, 4>>& spans) {
  std::vector<int> parts(tensors_.size()), place(tensors_.size());
  std::vector<char> led(plan_.layers.size());
  for (const auto& span : spans) ++parts[span[0]];
  for (const auto& [tensor, begin, end, layer] : spans) {
    Tensor& t = tensors_[tensor];
    const at::Tensor& p = THPVariable_Unpack(t.param);
    t.dense = is_dense(p, parts[tensor] > 1);
    t.dtype = p.dtype();
    t.sizes.assign(p.sizes().begin(), p.sizes().end());
    t.strides.assign(p.strides().begin(), p.strides().end());
    plan_.tensors[tensor].dtype = dtype_of(p);
    plan_.spans.push_back(span_of_rows(p, tensor, begin, end, layer));
    const int at = place[tensor]++;
    if (led[layer] || !t.state) continue;
    leaders_.push_back({int(layer), int(tensor), at});
    led[layer] = 1;
  }
}

bool LivePlan::holds_extra(const Tensor& t) const {
  const at::Tensor& x = THPVariable_Unpack(t.extra);
  if (held_ == Held::stochastic) {
    return x.scalar_type() == at::kLong && x.numel() == 1 && x.is_cpu();
  }
  return holds(t, x, held_ == Held::master ? caffe2::TypeMeta::Make<float>() : t.dtype);
}

int LivePlan::look_up(size_t i) {
  const Tensor& t = tensors_[i];
  plan_.tensors[i].active = false;
  const at::Tensor& p = THPVariable_Unpack(t.param);
  const at::Tensor& g = p.unsafeGetTensorImpl()->grad();
  if (!g.defined()) return ready;
  if (!t.state || !holds(t, p, t.dtype) || !same(p.strides(), t.strides) ||
      !t.snapshot->matches(t.state)) {
    return stale;
  }
  if (!holds(t, g, t.dtype)) return static_cast<int>(i);
  Operands x{&p, &g, {}, n_states_, &THPVariable_Unpack(t.step)};
  if (x.step->numel() != 1 || x.step->dtype() != t.step_dtype || x.step->device() != device_) {
    return stale;
  }
  for (int k = 0; k < n_states_; ++k) {
    x.states[k] = &THPVariable_Unpack(t.values[k]);
    if (!holds(t, *x.states[k], t.state_dtype)) return stale;
  }
  if (t.extra) {
    if (!holds_extra(t)) return stale;
    x.held = held_;
    x.extra = &THPVariable_Unpack(t.extra);
  }
  fill_row(plan_.tensors[i], staging_, x, t.dense);
  return ready;
}

void LivePlan::finish() {
  staging_.finish();
  const auto bump = [](PyObject* value) {
    const at::Tensor& t = THPVariable_Unpack(value);
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  };
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!plan_.tensors[i].active) continue;
    bump(tensors_[i].param);
    for (int k = 0; k < n_states_; ++k) bump(tensors_[i].values[k]);
    if (plan_.tensors[i].extra) bump(tensors_[i].extra);
  }
}

at::Tensor LivePlan::rows() const {
  const at::Tensor answer = at::zeros({int64_t(plan_.tensors.size()), 8}, at::kLong);
  int64_t* to = answer.data_ptr<int64_t>();
  for (const TensorRow& row : plan_.tensors) {
    const void* pointers[] = {row.param,    row.active ? row.grad : nullptr,
                              row.state[0], row.state[1],
                              row.state[2], row.step};
    for (const void* p : pointers) *to++ = reinterpret_cast<int64_t>(p);
    *to++ = row.extra ? reinterpret_cast<int64_t>(row.extra) : row.seed;
    *to++ = row.step_is_double;
  }
  return answer;
}

at::Tensor LivePlan::memory_pointers() const {
  const at::Tensor answer = at::zeros({int64_t(plan_.layers.size())}, at::kLong);
  int64_t* to = answer.data_ptr<int64_t>();
  for (const Layer& layer : plan_.layers) *to++ = reinterpret_cast<int64_t>(layer.memory);
  return answer;
}

}  // namespace layerlr
