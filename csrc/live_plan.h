// A plan over live Python objects. Whatever a user replaces is seen at the next step: gradients and
// data pointers are read afresh, state dicts are compared with what the plan was built from.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

#include "torch_plan.h"

namespace layerlr {

/// The keys and values of a dict in order, to be recognised by identity later. Far cheaper than
/// looking keys up: a tensor's hash is a Python call.
class Snapshot {
 public:
  explicit Snapshot(const py::dict& dict);
  bool matches(PyObject* dict) const;

 private:
  std::vector<py::object> items_;
};

/// Whether two lists hold the same objects: tensors must not be compared by value.
bool same_objects(const py::list& x, const py::list& y);

/// Looks the operands of a step up and checks them, on any device.
class LivePlan {
 public:
  enum Ready : int { ready = -1, stale = -2 };  // otherwise: index of a parameter to look at

  LivePlan(py::list params, py::list states, const std::vector<std::string>& keys,
           const std::vector<std::array<int64_t, 4>>& spans, const std::vector<bool>& ruled,
           const std::vector<double>& lr_scale, const std::vector<double>& start_radius,
           const std::string& direction, const std::optional<std::string>& rule,
           const std::optional<std::string>& memory_key, at::Tensor stats,
           const std::string& precision, const std::string& extra_key);

  /// Read gradients and data pointers into plan().
  int prepare();
  /// After the step: copy staged tensors back, tell autograd what was written.
  void finish();

  Plan& plan() { return plan_; }
  at::Device device() const { return stats_.device(); }

  /// [tensors, 8], int64 on the host: pointers of param, gradient (0: none), three states and step,
  /// pointer to what is held beside the weights or the seed of their rounding, whether step is
  /// float64.
  at::Tensor rows() const;
  /// [layers], int64 on the host: pointers of the layers' memory, or 0.
  at::Tensor memory_pointers() const;

 private:
  /// The objects behind one parameter. All are kept alive by params_, states_ and the snapshot.
  struct Tensor {
    PyObject* param = nullptr;
    PyObject* state = nullptr;  // its dict, or null: frozen, no state yet
    std::optional<Snapshot> snapshot;
    PyObject* values[max_states] = {};
    PyObject* step = nullptr;
    PyObject* memory = nullptr;  // of the layers of its parts
    PyObject* extra = nullptr;   // what 16-bit weights have beside them
    at::DimVector sizes, strides;
    caffe2::TypeMeta dtype, state_dtype, step_dtype;
    bool dense = true;
  };
  /// The first part of a layer whose tensor has a state: there lies what the layer memory_key.
  struct Leader {
    int layer, tensor, place;
  };

  /// Tensors can change under their identity (t.data = ...): what kernels assume is compared.
  bool holds(const Tensor& t, const at::Tensor& x, caffe2::TypeMeta wanted) const {
    return x.dtype() == wanted && same(x.sizes(), t.sizes) && x.device() == device_ &&
           x.layout() == at::kStrided;
  }
  void find_values(size_t i, const std::vector<std::string>& keys,
                   const std::optional<std::string>& memory_key, const std::string& extra_key);
  void read_layouts(const std::vector<std::array<int64_t, 4>>& spans);
  bool holds_extra(const Tensor& t) const;
  int look_up(size_t i);

  py::list params_, states_;
  at::Tensor stats_;
  at::Device device_;
  int n_states_;
  Held held_;  // how 16-bit weights are
  Plan plan_;
  std::vector<Tensor> tensors_;
  std::vector<Leader> leaders_;
  Staging staging_;
};

}  // namespace layerlr
