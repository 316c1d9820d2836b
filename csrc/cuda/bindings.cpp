// layerlr._cuda: hands the CUDA engine to layerlr._C. Free of torch; importing it touches no GPU.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/engine.h"

namespace py = pybind11;

namespace layerlr {

const Engine& cuda_engine();

namespace {

py::dict device_info(int index) {
  DeviceInfo info;
  if (const char* error = cuda_engine().info(index, &info)) throw std::runtime_error(error);
  py::dict answer;
  answer["multiprocessors"] = info.multiprocessors;
  return answer;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def(
      "engine", [] { return py::capsule(&cuda_engine(), engine_capsule); },
      "The kernels, for layerlr._C.");
  m.def("device_info", &device_info, "What a schedule needs to know of a device.");
  m.attr("architectures") = py::str(LAYERLR_CUDA_ARCH).attr("split")(";");
}

}  // namespace layerlr
