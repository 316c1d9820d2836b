// layerlr._C: the cached plans of the eager path, and the registries.
#include <ATen/Functions.h>

#include "cpu/kernels.h"
#include "device_plan.h"

namespace layerlr {
namespace {

StepConfig step_config(double lr, double weight_decay, bool decoupled, double sign, bool skip,
                       const std::vector<double>& direction_hyper) {
  StepConfig config;
  config.lr = lr;
  config.weight_decay = weight_decay;
  config.decoupled = decoupled;
  config.sign = sign;
  config.skip = skip;
  std::copy(direction_hyper.begin(), direction_hyper.end(), config.direction_hyper);
  return config;
}

/// On the CPU.
class CpuPlan : public LivePlan {
 public:
  explicit CpuPlan(const LivePlan& live) : LivePlan(live) { plan().finish(); }

  void step(const StepConfig& config) {
    {
      py::gil_scoped_release release;
      layerlr::step(plan(), config, torch_threads());
    }
    finish();
  }

  at::Tensor measure(const StepConfig& config) {
    py::gil_scoped_release release;
    const at::Tensor sums = at::empty({layers(), 4}, at::kDouble);
    layerlr::measure(plan(), config, torch_threads(), rows_of(sums));
    return sums;
  }

  void apply(const StepConfig& config, const at::Tensor& sums) {
    TORCH_CHECK(sums.sizes() == at::IntArrayRef({layers(), 4}) && sums.is_contiguous());
    {
      py::gil_scoped_release release;
      layerlr::apply(plan(), config, torch_threads(), rows_of(sums));
    }
    finish();
  }

  at::Tensor norms(const StepConfig& config) {
    py::gil_scoped_release release;
    const at::Tensor sums = at::empty({layers()}, at::kDouble);
    layerlr::norms(plan(), config, torch_threads(), sums.data_ptr<double>());
    return sums;
  }

 private:
  int64_t layers() { return plan().layers.size(); }
  static LayerStats* rows_of(const at::Tensor& sums) {
    return reinterpret_cast<LayerStats*>(sums.data_ptr<double>());
  }
};

/// A method that wants a config as a function of the numbers in it.
template <class P, class R, class... More>
auto of_numbers(R (P::*method)(const StepConfig&, More...)) {
  return [method](P& plan, double lr, double weight_decay, bool decoupled, double sign, bool skip,
                  const std::vector<double>& direction_hyper, More... more) {
    return (plan.*method)(step_config(lr, weight_decay, decoupled, sign, skip, direction_hyper),
                          more...);
  };
}

const Engine* engine_in(const py::capsule& capsule) {
  return static_cast<const Engine*>(PyCapsule_GetPointer(capsule.ptr(), engine_capsule));
}

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
  m.def("is_dense", &is_dense, "Whether kernels take a tensor as it lies in memory.");
  py::class_<Snapshot>(m, "Snapshot", "Recognises a dict that still holds the same objects.")
      .def(py::init<py::dict>())
      .def("matches",
           [](const Snapshot& s, const py::dict& dict) { return s.matches(dict.ptr()); });
  py::class_<LivePlan>(m, "LivePlan")
      .def(py::init<py::list, py::list, const std::vector<std::string>&,
                    const std::vector<std::array<int64_t, 4>>&, const std::vector<bool>&,
                    const std::vector<double>&, const std::string&,
                    const std::optional<std::string>&, const std::vector<double>&,
                    const std::optional<std::string>&, at::Tensor, const std::string&,
                    const std::string&>())
      .def("prepare", &LivePlan::prepare)
      .def("finish", &LivePlan::finish)
      .def("rows", &LivePlan::rows)
      .def("kept", &LivePlan::kept)
      .def_property_readonly_static("READY", [](py::object) { return int(LivePlan::ready); })
      .def_property_readonly_static("STALE", [](py::object) { return int(LivePlan::stale); });
  py::class_<CpuPlan, LivePlan>(m, "CpuPlan")
      .def(py::init<const LivePlan&>())
      .def("step", of_numbers(&CpuPlan::step))
      .def("measure", of_numbers(&CpuPlan::measure))
      .def("apply", of_numbers(&CpuPlan::apply))
      .def("norms", of_numbers(&CpuPlan::norms));
  py::class_<DevicePlan, LivePlan>(m, "DevicePlan")
      .def(py::init(
          [](const LivePlan& live, const py::capsule& engine, int blocks, int distance) {
            return new DevicePlan(live, engine_in(engine), {blocks, distance});
          }))
      .def("step", of_numbers(&DevicePlan::step))
      .def("measure", of_numbers(&DevicePlan::measure))
      .def("apply", of_numbers(&DevicePlan::apply))
      .def("norms", of_numbers(&DevicePlan::norms))
      .def("refresh", of_numbers(&DevicePlan::refresh))
      .def("memory", &DevicePlan::memory);
}

}  // namespace layerlr
