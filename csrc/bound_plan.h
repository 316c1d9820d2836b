// A plan bound to live Python objects. Whatever a user replaces is seen at the next step: gradients
// and data pointers are read afresh, state dicts are compared with what the plan was built from.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

#include "operands.h"

namespace layerlr {

/// The keys and values of a dict in order, to be recognised by identity later. Far cheaper than
/// looking keys up: a tensor's hash is a Python call. A dict that nobody has changed since it was
/// recognised is known by its version alone.
class Snapshot {
 public:
  explicit Snapshot(const py::dict& dict);
  bool matches(PyObject* dict) {
    const uint64_t now = version_of(dict);
    if (now != 0 && now == version_) return true;
    if (!holds_the_same(dict)) return false;
    version_ = now;
    return true;
  }

 private:
  bool holds_the_same(PyObject* dict) const;
  /// A number that no other contents of any dict have had, or 0 where Python keeps none.
  static uint64_t version_of(PyObject* dict);

  std::vector<py::object> items_;
  uint64_t version_;  // of a dict that held them
};

// Python 3.12 deprecates the number, 3.13 is the last to keep it.
inline uint64_t Snapshot::version_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

/// A parameter and its state (None: it has none), to be recognised: users replace both, or change
/// them in place.
class Known {
 public:
  Known(const py::object& param, const py::object& state);
  /// Whether the state holds the same objects.
  bool is_same() { return !snapshot_ || snapshot_->matches(state_.ptr()); }
  /// Whether they are the same objects, of the same form.
  bool fits() { return is_same() && forms() == forms_; }

 private:
  struct Form {
    caffe2::TypeMeta dtype;
    at::DimVector sizes;
    at::Device device;
    c10::DispatchKeySet keys;
    bool writable;
    bool operator==(const Form& other) const = default;
  };
  std::vector<Form> forms() const;

  py::object param_, state_;
  std::optional<Snapshot> snapshot_;
  std::vector<Form> forms_;
};

/// Whether two lists hold the same objects: tensors must not be compared by value.
bool same_objects(const py::list& x, const py::list& y);

/// What a plan is built from: backends/native.py fills it.
struct PlanSpec {
  py::list params, states;
  std::vector<std::string> keys;           // of the direction's states
  std::vector<std::string> aux_keys;       // of what lies beside each of them, where something does
  std::string precision, weights_aux_key;  // of 16-bit weights
  std::vector<std::array<int64_t, 4>> spans;  // tensor, first row, last row + 1, layer
  std::vector<bool> ruled;                    // of each layer
  std::vector<double> lr_scale, start_radius;
  std::string direction;
  std::optional<std::string> rule, memory_key;
  at::Tensor stats;
};

/// Looks the operands of a step up and checks them, on any device.
class BoundPlan {
 public:
  enum Ready : int { ready = -1, stale = -2 };  // otherwise: index of a parameter to look at

  explicit BoundPlan(const PlanSpec& spec);
  BoundPlan(const BoundPlan&) = delete;

  /// Read gradients and data pointers into plan().
  int prepare();
  /// After the step: copy staged tensors back, tell autograd what was written.
  void finish();
  /// Instead of a step: let go of what prepare() has read.
  void forget();

  /// As long as it lives, what prepare() has found is in use, and another thread's prepare() or use
  /// is an error: the interpreter's lock may be let go.
  class Use {
   public:
    explicit Use(BoundPlan& plan);
    ~Use() { plan_.used_ = false; }
    Use(const Use&) = delete;

   private:
    BoundPlan& plan_;
  };

  Plan& plan() { return plan_; }
  at::Device device() const { return stats_.device(); }

  /// The rows of plan() as int64 [tensors, size of a row], on the host.
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
    PyObject* scales[max_states] = {};  // of codes
    PyObject* step = nullptr;
    PyObject* memory = nullptr;       // of the layers of its parts
    PyObject* weights_aux = nullptr;  // what 16-bit weights have beside them
    at::DimVector sizes, strides, scale_sizes;
    caffe2::TypeMeta dtype, step_dtype, state_dtypes[max_states];
    bool dense = true, contiguous = true;
    bool plain = true;  // dense, and its elements are what memory holds: not a conjugate's
    c10::DispatchKeySet keys;
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
  /// Whether x lies in memory as the plan has it for the parameter: the quick way to know that it
  /// holds and needs no staging. Tensors of the same dispatch keys have the same layout, and both
  /// are conjugates or neither.
  bool lies_as_planned(const Tensor& t, const c10::TensorImpl& x, caffe2::TypeMeta wanted) const {
    if (!t.plain || x.key_set() != t.keys || x.dtype() != wanted || x.device() != device_ ||
        !same(x.sizes(), t.sizes)) {
      return false;
    }
    return t.contiguous ? x.is_contiguous() : same(x.strides(), t.strides);
  }
  /// Whether x is numbers of that type, one after another in memory.
  bool holds_numbers(const at::Tensor& x, at::ScalarType type) const {
    return x.is_contiguous() && x.device() == device_ && x.scalar_type() == type &&
           holds_elements(x);
  }
  void find_values(size_t i, const PlanSpec& spec);
  void read_layouts(const std::vector<std::array<int64_t, 4>>& spans);
  bool holds_scales(const Tensor& t, int k) const;
  int look_up(size_t i);

  py::list params_, states_;
  at::Tensor stats_;
  at::Device device_;
  int n_states_;
  Codec weights_;  // how those of 16 bits are stored
  Plan plan_;
  std::vector<Tensor> tensors_;
  std::vector<Leader> leaders_;
  Staging staging_;
  bool prepared_ = false, used_ = false;
};

}  // namespace layerlr
