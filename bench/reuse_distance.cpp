// From the sizes of a model's layers, on standard input, the item by item order of a step: for each
// item of a second pass its elements and how many elements of either pass were taken between the
// two visits to it. bench/reuse_distance.py makes bytes of them.
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <utility>

#include "cuda/schedule.h"

using namespace layerlr;

int main(int, char** arguments) {
  const int multiprocessors = std::atoi(arguments[1]), distance = std::atoi(arguments[2]);
  Plan plan;
  long long size;
  for (int32_t i = 0; std::scanf("%lld", &size) == 1; ++i) {
    plan.tensors.emplace_back();
    plan.spans.push_back({i, i, 0, size});
    plan.layers.emplace_back();
  }
  const Schedule s = make_schedule(plan, true, {multiprocessors, tile_elements}, {0, distance});
  std::unordered_map<uint32_t, std::pair<int64_t, int64_t>> first;  // by slot: taken by its end
  int64_t taken[2] = {0, 0};
  for (const Item& item : s.items) {
    const int64_t begin = int64_t(item.number) * s.item_elements,
                  left = plan.spans[item.span].end - begin,
                  n = left < s.item_elements ? left : s.item_elements;
    if (item.second) {
      const auto [ones, twos] = first.at(item.slot);
      std::printf("%lld %lld %lld\n", static_cast<long long>(n),
                  static_cast<long long>(taken[0] - ones), static_cast<long long>(taken[1] - twos));
    }
    taken[item.second] += n;
    if (!item.second) first[item.slot] = {taken[0], taken[1]};
  }
}
