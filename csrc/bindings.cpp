// layerlr._C: the cached plan of the eager path, and the registries.
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "torch_plan.h"

namespace layerlr {
namespace {

/// The keys and values of a dict in order, to be recognised by identity later. Far cheaper than
/// looking keys up: a tensor's hash is a Python call.
class Snapshot {
 public:
  explicit Snapshot(const py::dict& dict) {
    for (const auto& [key, value] : dict) {
      items_.push_back(py::reinterpret_borrow<py::object>(key));
      items_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
  bool matches(PyObject* dict) const {
    if (PyDict_GET_SIZE(dict) * 2 != Py_ssize_t(items_.size())) return false;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
      if (items_[i].ptr() != key || items_[i + 1].ptr() != value) return false;
    }
    return true;
  }

 private:
  std::vector<py::object> items_;
};

/// Whether two lists hold the same objects: tensors must not be compared by value.
bool same_objects(const py::list& x, const py::list& y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (PyList_GET_ITEM(x.ptr(), i) != PyList_GET_ITEM(y.ptr(), i)) return false;
  }
  return true;
}

/// A plan over live Python objects. Whatever a user replaces is seen at the next step: gradients
/// and data pointers are read afresh, state dicts are compared with what the plan was built from.
class PyPlan {
 public:
  enum Ready : int { ready = -1, stale = -2 };  // otherwise: index of a parameter to look at

  PyPlan(py::list params, py::list states, const std::vector<std::string>& keys,
         const std::vector<std::array<int64_t, 4>>& spans, const std::vector<bool>& ruled,
         const std::vector<double>& lr_scale, const std::string& direction,
         const std::optional<std::string>& rule, const std::vector<double>& rule_hyper,
         at::Tensor stats)
      : params_(std::move(params)),
        states_(std::move(states)),
        stats_(std::move(stats)),
        n_states_(static_cast<int>(keys.size())) {
    configure(plan_, direction, rule.value_or(""), rule_hyper, ruled, lr_scale, stats_);
    plan_.tensors.resize(params_.size());
    tensors_.resize(params_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) find_values(i, keys);
    read_layouts(spans);
    plan_.finish();
  }

  int prepare() {
    staging_ = {};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int answer = look_up(i);
      if (answer != ready) return answer;
    }
    for (const Radius& r : radii_) {
      PyObject* value = tensors_[r.tensor].radius;
      if (value && THPVariable_Unpack(value).numel() <= r.place) return stale;
      plan_.layers[r.layer].radius =
          value ? THPVariable_Unpack(value).data_ptr<double>() + r.place : nullptr;
    }
    return ready;
  }

  void step(double lr, double weight_decay, bool decoupled, bool maximize, bool skip,
            const std::vector<double>& direction_hyper) {
    StepConfig config;
    config.lr = lr;
    config.weight_decay = weight_decay;
    config.decoupled = decoupled;
    config.maximize = maximize;
    config.skip = skip;
    std::copy(direction_hyper.begin(), direction_hyper.end(), config.direction_hyper);
    {
      py::gil_scoped_release release;
      step_with_torch_threads(plan_, config);
    }
    staging_.finish();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (plan_.tensors[i].active) bump_versions(i);
    }
  }

 private:
  /// The objects behind one parameter. All are kept alive by params_, states_ and the snapshot.
  struct Tensor {
    PyObject* param = nullptr;
    PyObject* state = nullptr;  // its dict, or null: frozen, no state yet
    std::optional<Snapshot> snapshot;
    PyObject* values[max_states] = {};
    PyObject* step = nullptr;
    PyObject* radius = nullptr;
    at::DimVector sizes, strides;
    caffe2::TypeMeta dtype, state_dtype, step_dtype;
    bool dense = true;

    /// Tensors can change under their identity (t.data = ...): what kernels assume is compared.
    bool holds(const at::Tensor& x, caffe2::TypeMeta wanted) const {
      return x.dtype() == wanted && same(x.sizes(), sizes) && x.is_cpu() &&
             x.layout() == at::kStrided;
    }
  };
  struct Radius {
    int layer, tensor, place;
  };

  void find_values(size_t i, const std::vector<std::string>& keys) {
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
    t.radius = get("radius");
    t.step_dtype = THPVariable_Unpack(t.step).dtype();
    if (n_states_) t.state_dtype = THPVariable_Unpack(t.values[0]).dtype();
  }

  void read_layouts(const std::vector<std::array<int64_t, 4>>& spans) {
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
      plan_.spans.push_back(span_of_rows(p, tensor, begin, end, layer));
      if (!led[layer]) radii_.push_back({int(layer), int(tensor), place[tensor]});
      led[layer] = 1;
      ++place[tensor];
    }
  }

  int look_up(size_t i) {
    const Tensor& t = tensors_[i];
    plan_.tensors[i].active = false;
    const at::Tensor& p = THPVariable_Unpack(t.param);
    const at::Tensor& g = p.unsafeGetTensorImpl()->grad();
    if (!g.defined()) return ready;
    if (!t.state || !t.holds(p, t.dtype) || !same(p.strides(), t.strides) ||
        !t.snapshot->matches(t.state)) {
      return stale;
    }
    if (!t.holds(g, t.dtype)) return static_cast<int>(i);
    Operands x{&p, &g, {}, n_states_, &THPVariable_Unpack(t.step)};
    if (x.step->numel() != 1 || x.step->dtype() != t.step_dtype || !x.step->is_cpu()) return stale;
    for (int k = 0; k < n_states_; ++k) {
      x.states[k] = &THPVariable_Unpack(t.values[k]);
      if (!t.holds(*x.states[k], t.state_dtype)) return stale;
    }
    fill_row(plan_.tensors[i], staging_, x, t.dense);
    return ready;
  }

  /// autograd must see that these were written, as after an in-place op.
  void bump_versions(size_t i) {
    const auto bump = [](const at::Tensor& t) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    };
    bump(THPVariable_Unpack(tensors_[i].param));
    for (int k = 0; k < n_states_; ++k) bump(THPVariable_Unpack(tensors_[i].values[k]));
  }

  py::list params_, states_;
  at::Tensor stats_;
  int n_states_;
  Plan plan_;
  std::vector<Tensor> tensors_;
  std::vector<Radius> radii_;
  Staging staging_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("directions", &direction_names, "Names of the directions that the kernels know.");
  m.def("rules", &rule_names, "Names of the rules that the kernels know.");
  m.def("columns", [] { return int(columns); }, "Columns of a plan's statistics.");
  m.def("instruction_set", [] { return std::string(instruction_set()); });
  m.def("use_instruction_set", [](const std::string& name) {
    TORCH_CHECK_VALUE(use_instruction_set(name.c_str()), "no instruction set '", name, "' here");
  });
  m.def("same_objects", &same_objects, "Whether two lists hold the same objects.");
  py::class_<Snapshot>(m, "Snapshot", "Recognises a dict that still holds the same objects.")
      .def(py::init<py::dict>())
      .def("matches",
           [](const Snapshot& s, const py::dict& dict) { return s.matches(dict.ptr()); });
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<py::list, py::list, const std::vector<std::string>&,
                    const std::vector<std::array<int64_t, 4>>&, const std::vector<bool>&,
                    const std::vector<double>&, const std::string&,
                    const std::optional<std::string>&, const std::vector<double>&, at::Tensor>())
      .def("prepare", &PyPlan::prepare)
      .def("step", &PyPlan::step)
      .def_property_readonly_static("READY", [](py::object) { return int(PyPlan::ready); })
      .def_property_readonly_static("STALE", [](py::object) { return int(PyPlan::stale); });
}

}  // namespace layerlr
