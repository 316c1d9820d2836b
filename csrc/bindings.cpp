// layerlr._C: the cached plan of the eager path, and the registries.
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "torch_plan.h"

namespace layerlr {
namespace {

/// A plan over live Python objects: parameters and their state dicts are looked up again at every
/// step, so whatever a user replaces is seen; what they point to is never cached.
class PyPlan {
 public:
  enum Ready : int { ready = -1, stale = -2 };  // otherwise: index of a parameter to look at

  PyPlan(py::list params, py::list states, std::vector<std::string> keys,
         const std::vector<std::array<int64_t, 4>>& spans, const std::vector<bool>& ruled,
         const std::vector<double>& lr_scale, const std::string& direction,
         const std::optional<std::string>& rule, const std::vector<double>& rule_hyper,
         at::Tensor stats)
      : params_(std::move(params)), states_(std::move(states)), stats_(std::move(stats)) {
    for (const std::string& key : keys) keys_.push_back(py::str(key));
    n_states_ = static_cast<int>(keys.size());
    plan_.direction = index_of(direction_names(), direction, "direction");
    plan_.has_rule = rule.has_value();
    if (rule) plan_.rule = static_cast<RuleId>(index_of(rule_names(), *rule, "rule"));
    std::copy(rule_hyper.begin(), rule_hyper.end(), plan_.rule_hyper);
    plan_.stats = stats_.data_ptr<double>();
    plan_.layers.resize(ruled.size());
    for (size_t l = 0; l < ruled.size(); ++l) {
      plan_.layers[l].ruled = ruled[l];
      plan_.layers[l].lr_scale = lr_scale[l];
    }
    plan_.tensors.resize(params_.size());
    read_layouts(spans);
    plan_.finish();
    find_values();
  }

  int prepare(const py::dict& state) {
    staging_ = {};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int answer = look_up(i, state);
      if (answer != ready) return answer;
    }
    for (const Radius& r : radii_) {
      PyObject* value = tensors_[r.tensor].radius;
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
  /// The objects behind one parameter. All are kept alive by params_ and states_.
  struct Tensor {
    PyObject* param = nullptr;
    PyObject* state = nullptr;  // its dict, or null: frozen, no state yet
    PyObject* values[max_states] = {};
    PyObject* step = nullptr;
    PyObject* radius = nullptr;
    at::DimVector sizes, strides;
    bool split = false;
  };
  struct Radius {
    int layer, tensor, place;
  };

  void read_layouts(const std::vector<std::array<int64_t, 4>>& spans) {
    tensors_.resize(params_.size());
    std::vector<int> parts(params_.size());
    for (const auto& span : spans) ++parts[span[0]];
    std::vector<char> led(plan_.layers.size());
    std::vector<int> place(params_.size());
    for (const auto& [tensor, begin, end, layer] : spans) {
      Tensor& t = tensors_[tensor];
      t.param = PyList_GET_ITEM(params_.ptr(), tensor);
      const at::Tensor& p = THPVariable_Unpack(t.param);
      t.split = parts[tensor] > 1;
      t.sizes.assign(p.sizes().begin(), p.sizes().end());
      t.strides.assign(p.strides().begin(), p.strides().end());
      const int64_t rows = p.dim() ? p.size(0) : 1, row = rows ? elements(p) / rows : 0;
      plan_.spans.push_back(
          {static_cast<int32_t>(tensor), static_cast<int32_t>(layer), begin * row, end * row});
      if (!led[layer]) radii_.push_back({int(layer), int(tensor), place[tensor]});
      led[layer] = 1;
      ++place[tensor];
    }
  }

  static PyObject* get(PyObject* dict, const py::str& key) {
    return PyDict_GetItem(dict, key.ptr());
  }

  void find_values() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      PyObject* state = PyList_GET_ITEM(states_.ptr(), i);
      if (state == Py_None) continue;
      Tensor& t = tensors_[i];
      t.state = state;
      for (int k = 0; k < n_states_; ++k) t.values[k] = keep(get(state, keys_[k]));
      t.step = keep(get(state, step_key_));
      t.radius = keep(get(state, radius_key_));
    }
  }

  /// Hold a reference, so that the identity of what is compared later cannot be reused.
  PyObject* keep(PyObject* value) {
    if (value) kept_.push_back(py::reinterpret_borrow<py::object>(value));
    return value;
  }

  int look_up(size_t i, const py::dict& state) {
    Tensor& t = tensors_[i];
    plan_.tensors[i].active = false;
    if (PyDict_GetItem(state.ptr(), t.param) != t.state) return stale;
    const at::Tensor& p = THPVariable_Unpack(t.param);
    const at::Tensor& g = p.unsafeGetTensorImpl()->grad();
    if (!g.defined()) return ready;
    if (!t.state || !p.device().is_cpu() || p.sizes() != t.sizes || p.strides() != t.strides) {
      return stale;
    }
    for (int k = 0; k < n_states_; ++k) {
      if (get(t.state, keys_[k]) != t.values[k]) return stale;
    }
    if (get(t.state, step_key_) != t.step || get(t.state, radius_key_) != t.radius) return stale;
    if (g.layout() != at::kStrided || !g.device().is_cpu() || g.scalar_type() != p.scalar_type() ||
        g.sizes() != p.sizes()) {
      return static_cast<int>(i);
    }
    const at::Tensor* states[max_states];
    for (int k = 0; k < n_states_; ++k) states[k] = &THPVariable_Unpack(t.values[k]);
    fill_row(plan_.tensors[i], staging_, p, g, states, n_states_, THPVariable_Unpack(t.step),
             t.split);
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
  std::vector<py::str> keys_;
  py::str step_key_{"step"}, radius_key_{"radius"};
  at::Tensor stats_;
  int n_states_ = 0;
  Plan plan_;
  std::vector<Tensor> tensors_;
  std::vector<Radius> radii_;
  std::vector<py::object> kept_;
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
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<py::list, py::list, std::vector<std::string>,
                    const std::vector<std::array<int64_t, 4>>&, const std::vector<bool>&,
                    const std::vector<double>&, const std::string&,
                    const std::optional<std::string>&, const std::vector<double>&, at::Tensor>())
      .def("prepare", &PyPlan::prepare)
      .def("step", &PyPlan::step)
      .def_property_readonly_static("READY", [](py::object) { return int(PyPlan::ready); })
      .def_property_readonly_static("STALE", [](py::object) { return int(PyPlan::stale); });
}

}  // namespace layerlr
