// layerlr._C: the cached plans of the eager path, and the registries.
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <cstring>

#include "cpu/kernels.h"
#include "cpu_plan.h"
#include "cuda/loader.h"
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

py::dict directions() {
  py::dict every;
  const std::vector<std::string> names = direction_names();
  for (size_t d = 0; d < names.size(); ++d) every[names[d].c_str()] = states_of(int(d));
  return every;
}

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
    flags["plain_at_zero"] = info.plain_at_zero;
    every[info.name] = flags;
  }
  return every;
}

py::dict device_info(const Library& library, int index) {
  DeviceInfo info;
  if (const char* error = library.engine.info(index, &info)) throw std::runtime_error(error);
  py::dict answer;
  answer["multiprocessors"] = info.multiprocessors;
  return answer;
}

/// torch.set_grad_enabled in a fifth of its time.
struct GradMode {
  bool enabled, before = false;
  void enter() {
    before = c10::GradMode::is_enabled();
    c10::GradMode::set_enabled(enabled);
  }
  void exit(const py::args&) const { c10::GradMode::set_enabled(before); }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("directions", &directions,
        "Name of each direction that the kernels know, and of its states which are never below 0.");
  m.def("rules", &rules, "Name and flags of each rule that the kernels know.");
  m.def("columns", [] { return int(columns); }, "Columns of a plan's statistics.");
  py::dict config;
  for_config_places([&](const char* name, size_t place) { config[name] = place; });
  m.attr("CONFIG") = config;
  py::dict row;
  for_row_places([&](const char* name, size_t place) { row[name] = place; });
  m.attr("ROW") = row;
  m.attr("CODE_BLOCK") = int(code_block);
  m.def("instruction_set", [] { return std::string(instruction_set()); });
  m.def("use_instruction_set", [](const std::string& name) {
    TORCH_CHECK_VALUE(use_instruction_set(name.c_str()), "no instruction set '", name, "' here");
  });
  m.attr("NO_CUDA") = LAYERLR_NO_CUDA;  // why the CUDA kernels were left out
  py::class_<Library>(m, "CudaLibrary", "The CUDA kernels.")
      .def_property_readonly(
          "architectures",
          [](const Library& library) { return py::str(library.architectures).attr("split")(";"); })
      .def("device_info", &device_info, "What a schedule needs to know of a device.");
  m.def("open_cuda_library", &open_library, py::return_value_policy::reference,
        "The CUDA kernels of the library at a path. Touches no GPU.");
  m.def("same_objects", &same_objects, "Whether two lists hold the same objects.");
  m.def("is_recorded", &at::hasCallbacks, "Whether a profiler or tracer sees what is called.");
  py::class_<GradMode>(m, "GradMode", "Within it autograd records, or does not.")
      .def(py::init([](bool enabled) { return GradMode{enabled}; }))
      .def("__enter__", &GradMode::enter)
      .def("__exit__", &GradMode::exit);
  m.def("is_dense", &is_dense, "Whether kernels take a tensor as it lies in memory.");
  py::class_<Snapshot>(m, "Snapshot", "Recognises a dict that still holds the same objects.")
      .def(py::init<py::dict>())
      .def("matches", [](Snapshot& s, const py::dict& dict) { return s.matches(dict.ptr()); });
  py::class_<Known>(m, "Known", "Recognises a parameter and its state, in the same form.")
      .def(py::init<py::object, py::object>())
      .def("is_same", &Known::is_same)
      .def("fits", &Known::fits);
  py::class_<PlanSpec>(m, "PlanSpec")
      .def(py::init<>())
#define LAYERLR_FIELD(name) .def_readwrite(#name, &PlanSpec::name)
          LAYERLR_FIELD(params) LAYERLR_FIELD(states) LAYERLR_FIELD(keys) LAYERLR_FIELD(aux_keys)
              LAYERLR_FIELD(precision) LAYERLR_FIELD(weights_aux_key) LAYERLR_FIELD(spans)
                  LAYERLR_FIELD(ruled) LAYERLR_FIELD(lr_scale) LAYERLR_FIELD(start_radius)
                      LAYERLR_FIELD(direction) LAYERLR_FIELD(rule) LAYERLR_FIELD(memory_key)
                          LAYERLR_FIELD(stats);
#undef LAYERLR_FIELD
  py::class_<BoundPlan>(m, "BoundPlan")
      .def(py::init<const PlanSpec&>())
      .def("prepare", &BoundPlan::prepare)
      .def("finish", &BoundPlan::finish)
      .def("forget", &BoundPlan::forget)
      .def("rows", &BoundPlan::rows)
      .def("memory_pointers", &BoundPlan::memory_pointers)
      .def_property_readonly_static("READY", [](py::object) { return int(BoundPlan::ready); })
      .def_property_readonly_static("STALE", [](py::object) { return int(BoundPlan::stale); });
  py::class_<CpuPlan, BoundPlan>(m, "CpuPlan")
      .def(py::init<const PlanSpec&>())
      .def("step", &CpuPlan::step)
      .def("measure", &CpuPlan::measure)
      .def("apply", &CpuPlan::apply)
      .def("norms", &CpuPlan::norms);
  py::class_<DevicePlan, BoundPlan>(m, "DevicePlan")
      .def(py::init([](const PlanSpec& spec, const Library& library, int blocks, int distance) {
        return new DevicePlan(spec, library.engine, {blocks, distance});
      }))
      .def("step", &DevicePlan::step)
      .def("measure", &DevicePlan::measure)
      .def("apply", &DevicePlan::apply)
      .def("norms", &DevicePlan::norms)
      .def("refresh", &DevicePlan::refresh)
      .def("memory", &DevicePlan::memory);
}

}  // namespace layerlr
