// Every rule, in the order of their ids: R(hyper-parameters).scale(sums, lr, L2 decay, memory), the
// memory being the number that the layer stores from step to step (0: none).
#pragma once

#include "rules/adam_mini.h"
#include "rules/brake.h"
#include "rules/hyperball.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/layca.h"
#include "rules/plain.h"
#include "rules/rated.h"
#include "rules/singh.h"

#define LAYERLR_RULES(X) \
  X(Plain)               \
  X(Singh)               \
  X(Lars)                \
  X(Lamb)                \
  X(Layca)               \
  X(Rated)               \
  X(Hyperball)           \
  X(Relative)            \
  X(Brake)               \
  X(AdamMini)

namespace layerlr {

constexpr int max_rule_hyper = 4;

struct RuleInfo {
  const char* name;
  bool update, measures_ww, raw_gradient, latches, decays_apart, averages, plain_at_zero;
};

enum class RuleId : int32_t {
#define LAYERLR_ID(R) R,
  LAYERLR_RULES(LAYERLR_ID)
#undef LAYERLR_ID
};

constexpr int rule_count = 0
#define LAYERLR_ONE(R) +1
    LAYERLR_RULES(LAYERLR_ONE)
#undef LAYERLR_ONE
    ;

LAYERLR_HD constexpr RuleInfo rule_info(RuleId rule) {
  switch (rule) {
#define LAYERLR_CASE(R)                                                   \
  case RuleId::R:                                                         \
    return {R::name,    R::update,       R::measures_ww, R::raw_gradient, \
            R::latches, R::decays_apart, R::averages,    R::plain_at_zero};
    LAYERLR_RULES(LAYERLR_CASE)
#undef LAYERLR_CASE
  }
  return {};
}

LAYERLR_HD LayerScale evaluate(RuleId rule, const LayerStats& sums, double lr, double l2,
                               double memory, const double* hyper) {
  switch (rule) {
#define LAYERLR_CASE(R) \
  case RuleId::R:       \
    return R(hyper).scale(sums, lr, l2, memory);
    LAYERLR_RULES(LAYERLR_CASE)
#undef LAYERLR_CASE
  }
  return {};
}

}  // namespace layerlr
