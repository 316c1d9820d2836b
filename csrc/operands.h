// From torch tensors to the tables of plan.h: what they are to kernels, copies of what these cannot
// walk, the numbers of a plan.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include "cpu/engine.h"

namespace layerlr {

/// DType of a tensor's arithmetic parts (a complex number is two); throws for others.
DType dtype_of(const at::Tensor& t);

/// Elements of dtype_of(t).
int64_t elements(const at::Tensor& t);

/// Whether rows of dim 0 lie one after another in memory, so that a part of them is one range.
bool is_dense(const at::Tensor& t, bool split);

/// Where the elements of a strided tensor lie; null where their memory was freed, or cut off before
/// `count` of them.
inline void* address(const at::Tensor& t, int64_t count = 1) {
  const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  const c10::Storage& storage = impl.unsafe_storage();
  const int64_t size = impl.itemsize(), offset = impl.storage_offset();
  if (!storage || (offset + count) * size > int64_t(storage.nbytes())) return nullptr;
  void* const memory = storage.mutable_data();
  return memory ? static_cast<char*>(memory) + offset * size : nullptr;
}

/// Whether memory holds the elements as they are, if it holds any. A conjugate's holds others;
/// zeros that autograd makes (of sgn, say) and tensors that wrap others have none.
inline bool holds_elements(const at::Tensor& t) {
  const bool wraps = t.key_set().has(c10::DispatchKey::Python) && !address(t);
  return !t.is_conj() && !t.is_neg() && !t._is_zerotensor() && !wraps;
}

/// Whether a step can write into a tensor: layerlr/memory.py.
inline bool is_writable(const at::Tensor& t) {
  return !t._is_zerotensor() && at::has_internal_overlap(t) != at::MemOverlap::Yes &&
         (!t.is_inference() || c10::InferenceMode::is_enabled());
}

/// Elementwise equality. A loop, since these are one to four numbers and std::equal calls memcmp.
inline bool same(at::IntArrayRef x, at::IntArrayRef y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

/// Pointers of one tensor for a step, staging copies of what lies in memory in another order.
class Staging {
 public:
  /// Memory of t in the order of `like` (a dense tensor of the same shape), and whether the
  /// kernels write it: then a copy is copied back by finish(). Null where t has elements, but no
  /// memory.
  void* pointer(const at::Tensor& t, const at::Tensor& like, bool written);
  void finish();

 private:
  struct Copy {
    at::Tensor original, copy;
    bool written;
  };
  std::vector<Copy> copies_;
};

/// How a state tensor of that dtype is stored; Python has checked it.
Codec codec_of_state(caffe2::TypeMeta dtype);

/// Give a plan its direction, rule (empty: none), layers and statistics; throws for unknown names,
/// naming the alternatives, and for sizes that do not fit.
void configure(Plan& plan, const std::string& direction, const std::string& rule,
               const std::vector<bool>& ruled, at::ArrayRef<double> lr_scale,
               at::ArrayRef<double> start_radius, const at::Tensor& stats);

/// A precision as a codec of weights; empty: as they are.
Codec codec_of_weights(const std::string& precision);

/// The span of rows [begin, end) of dim 0, in elements.
Span span_of_rows(const at::Tensor& p, int64_t tensor, int64_t begin, int64_t end, int64_t layer);

/// torch's thread pool.
Threads torch_threads();

}  // namespace layerlr
