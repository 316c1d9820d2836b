// Every direction, in the order of their ids.
#pragma once

#include "directions/adagrad.h"
#include "directions/adam.h"
#include "directions/lion.h"
#include "directions/rmsprop.h"
#include "directions/sgd.h"

#if !defined(LAYERLR_DIRECTIONS)  // a test may compile a few only
#define LAYERLR_DIRECTIONS(X) \
  X(Sgd)                      \
  X(Momentum)                 \
  X(Nesterov)                 \
  X(AveragedMomentum)         \
  X(Adagrad)                  \
  X(Rmsprop)                  \
  X(RmspropCentered)          \
  X(RmspropMomentum)          \
  X(RmspropCenteredMomentum)  \
  X(Adam)                     \
  X(AmsGrad)                  \
  X(Lion)
#endif

namespace layerlr {
constexpr int max_states = 3;
constexpr int max_direction_hyper = 5;
}  // namespace layerlr
