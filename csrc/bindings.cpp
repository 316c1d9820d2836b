// layerlr._C: the cached plans of the eager path, and the registries.
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

  void step(double lr, double weight_decay, bool decoupled, double sign, bool skip,
            const std::vector<double>& direction_hyper) {
    const StepConfig config = step_config(lr, weight_decay, decoupled, sign, skip, direction_hyper);
    {
      py::gil_scoped_release release;
      step_with_torch_threads(plan(), config);
    }
    finish();
  }
};

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
      .def("step", &CpuPlan::step);
  py::class_<DevicePlan, LivePlan>(m, "DevicePlan")
      .def(py::init(
          [](const LivePlan& live, const py::capsule& engine, int blocks, int hold, bool plain) {
            return new DevicePlan(live, engine_in(engine), {blocks, hold, plain});
          }))
      .def("step",
           [](DevicePlan& plan, double lr, double weight_decay, bool decoupled, double sign,
              bool skip, const std::vector<double>& direction_hyper,
              const std::array<std::optional<at::Tensor>, 3>& there) {
             plan.step(step_config(lr, weight_decay, decoupled, sign, skip, direction_hyper),
                       {there[0], there[1], there[2]});
             plan.finish();
           })
      .def("memory", &DevicePlan::memory);
}

}  // namespace layerlr
