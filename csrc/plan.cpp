#include "plan.h"

#include <algorithm>

namespace layerlr {

void Plan::finish() {
  std::vector<std::vector<const Span*>> parts(layers.size());
  for (const Span& span : spans) parts[span.layer].push_back(&span);
  for (size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers[l];
    layer.chunk_begin = static_cast<int32_t>(chunks.size());
    for (const Span* span : parts[l]) {
      int64_t begin = span->begin;
      do {  // an empty tensor has an empty chunk: it takes part all the same
        const Row& row = tensors[span->tensor];
        const int64_t most = row.dtype == DType::f64 ? chunk_size_double : chunk_size;
        const int64_t count = std::min(most / row.block * row.block, span->end - begin);
        chunks.push_back({span->tensor, static_cast<int32_t>(count), begin});
        begin += count;
      } while (begin < span->end);
      layer.numel += span->end - span->begin;
    }
    layer.chunk_end = static_cast<int32_t>(chunks.size());
  }
  partials.resize(chunks.size());
  skips.resize(layers.size());
}

std::vector<std::string> direction_names() {
  return {
#define LAYERLR_NAME(D) D<float>::name,
      LAYERLR_DIRECTIONS(LAYERLR_NAME)
#undef LAYERLR_NAME
  };
}

namespace {

template <template <class> class D>
std::vector<bool> states() {
  std::vector<bool> answer;
  for (int k = 0; k < D<float>::states; ++k) answer.push_back(D<float>::nonnegative(k));
  return answer;
}

}  // namespace

std::vector<bool> states_of(int direction) {
  const std::vector<bool> all[] = {
#define LAYERLR_STATES(D) states<D>(),
      LAYERLR_DIRECTIONS(LAYERLR_STATES)
#undef LAYERLR_STATES
  };
  return all[direction];
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (int r = 0; r < rule_count; ++r) names.emplace_back(rule_info(static_cast<RuleId>(r)).name);
  return names;
}

}  // namespace layerlr
