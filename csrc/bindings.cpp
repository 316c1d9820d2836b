// layerlr._C: the cached plans of the eager path, and the registries.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "cpu/kernels.h"
#include "device_plan.h"

namespace pybind11::detail {

/// A config is any object with a buffer of as many float64: array.array("d", ...).
template <>
struct type_caster<layerlr::StepConfig> {
  PYBIND11_TYPE_CASTER(layerlr::StepConfig, const_name("array"));

  bool load(handle from, bool) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(from.ptr(), &buffer, PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    const bool fits = buffer.len == sizeof value && std::string(buffer.format) == "d";
    if (fits) std::memcpy(&value, buffer.buf, sizeof value);
    PyBuffer_Release(&buffer);
    return fits;
  }
};

}  // namespace pybind11::detail

namespace layerlr {
namespace {

/// On the CPU.
class CpuPlan : public LivePlan {
 public:
  explicit CpuPlan(const LivePlan& live) : LivePlan(live) { plan().finish(); }

  void step(const StepConfig& config) {
    if (config.found_inf != 0) return;
    {
      py::gil_scoped_release release;
      layerlr::step(plan(), config, torch_threads());
    }
    finish();
  }

  at::Tensor measure(const StepConfig& config) {
    py::gil_scoped_release release;
    if (config.found_inf != 0) return at::zeros({layers(), 4}, at::kDouble);
    const at::Tensor sums = at::empty({layers(), 4}, at::kDouble);
    layerlr::measure(plan(), config, torch_threads(), rows_of(sums));
    return sums;
  }

  void apply(const StepConfig& config, const at::Tensor& sums) {
    if (config.found_inf != 0) return;
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

py::dict rules() {
  py::dict every;
  for (int r = 0; r < rule_count; ++r) {
    const RuleInfo info = rule_info(static_cast<RuleId>(r));
    py::dict flags;
    flags["update"] = info.update;
    flags["measures_ww"] = info.measures_ww;
    flags["raw_gradient"] = info.raw_gradient;
    flags["latches"] = info.latches;
    flags["decays_apart"] = info.decays_apart;
    flags["averages"] = info.averages;
    every[info.name] = flags;
  }
  return every;
}

const Engine* engine_in(const py::capsule& capsule) {
  return static_cast<const Engine*>(PyCapsule_GetPointer(capsule.ptr(), engine_capsule));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("directions", &direction_names, "Names of the directions that the kernels know.");
  m.def("rules", &rules, "Name and flags of each rule that the kernels know.");
  m.def("columns", [] { return int(columns); }, "Columns of a plan's statistics.");
  py::dict config;
  for_config_places([&](const char* name, size_t place) { config[name] = place; });
  m.attr("CONFIG") = config;
  m.def("instruction_set", [] { return std::string(instruction_set()); });
  m.def("use_instruction_set", [](const std::string& name) {
    TORCH_CHECK_VALUE(use_instruction_set(name.c_str()), "no instruction set '", name, "' here");
  });
  m.attr("NO_CUDA") = LAYERLR_NO_CUDA;  // why layerlr._cuda was left out
  m.def("same_objects", &same_objects, "Whether two lists hold the same objects.");
  m.def("is_dense", &is_dense, "Whether kernels take a tensor as it lies in memory.");
  py::class_<Snapshot>(m, "Snapshot", "Recognises a dict that still holds the same objects.")
      .def(py::init<py::dict>())
      .def("matches",
           [](const Snapshot& s, const py::dict& dict) { return s.matches(dict.ptr()); });
  py::class_<LivePlan>(m, "LivePlan")
      .def(py::init<py::list, py::list, const std::vector<std::string>&,
                    const std::vector<std::array<int64_t, 4>>&, const std::vector<bool>&,
                    const std::vector<double>&, const std::vector<double>&, const std::string&,
                    const std::optional<std::string>&, const std::optional<std::string>&,
                    at::Tensor, const std::string&, const std::string&>())
      .def("prepare", &LivePlan::prepare)
      .def("finish", &LivePlan::finish)
      .def("rows", &LivePlan::rows)
      .def("memory_pointers", &LivePlan::memory_pointers)
      .def_property_readonly_static("READY", [](py::object) { return int(LivePlan::ready); })
      .def_property_readonly_static("STALE", [](py::object) { return int(LivePlan::stale); });
  py::class_<CpuPlan, LivePlan>(m, "CpuPlan")
      .def(py::init<const LivePlan&>())
      .def("step", &CpuPlan::step)
      .def("measure", &CpuPlan::measure)
      .def("apply", &CpuPlan::apply)
      .def("norms", &CpuPlan::norms);
  py::class_<DevicePlan, LivePlan>(m, "DevicePlan")
      .def(py::init([](const LivePlan& live, const py::capsule& engine, int blocks, int distance) {
        return new DevicePlan(live, engine_in(engine), {blocks, distance});
      }))
      .def("step", &DevicePlan::step)
      .def("measure", &DevicePlan::measure)
      .def("apply", &DevicePlan::apply)
      .def("norms", &DevicePlan::norms)
      .def("refresh", &DevicePlan::refresh)
      .def("memory", &DevicePlan::memory);
}

}  // namespace layerlr
