// The library of the CUDA engine, of the sources that nvcc compiles, for the CPU.
#include <functional>
#include <vector>

#include "cuda/engine.cu"
#include "simt.h"

namespace layerlr {
namespace {

/// A CUDA graph: what is launched during a capture is run when the graph is.
std::vector<std::function<void()>> graph;
bool recording = false;

const char* step_or_record(const StepArgs& args, int device, void* stream) {
  if (!recording) return cuda_engine().step(args, device, stream);
  graph.push_back([=] { cuda_engine().step(args, device, stream); });
  return nullptr;
}

const char* upload_or_record(void* to, const void* from, size_t n, int device, void* stream) {
  if (!recording) return cuda_engine().upload(to, from, n, device, stream);
  const std::vector<char> bytes(static_cast<const char*>(from), static_cast<const char*>(from) + n);
  graph.push_back([=] { cuda_engine().upload(to, bytes.data(), n, device, stream); });
  return nullptr;
}

bool is_recording(void*) { return recording; }

}  // namespace

extern "C" {
const Library* layerlr_cuda_library() {
  static const Library library{LAYERLR_LAYOUT,
                               "simt",
                               {cuda_engine().info, step_or_record,
                                cuda_engine().measure,  // whose answers torch would have to record
                                cuda_engine().apply, upload_or_record, is_recording}};
  return &library;
}

void simt_capture(bool on) {
  if (on) graph.clear();
  recording = on;
}
void simt_replay() {
  for (const auto& launch : graph) launch();
}
}

}  // namespace layerlr
