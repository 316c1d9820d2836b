"""From the sums of layers to what an update rule applies: decay, radii, steps already taken.

The specification of ``csrc/decide.h``, for layers of one rule at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerlr.rules import LayerRule, LayerScale, LayerStats

from .config import DECOUPLED_DECAY, PLAIN, RULE, TAKEN, StepConfig


class Layers(NamedTuple):
    """What layers bring along beside their sums, one entry a layer.

    The memory of a rule with a radius: 0 before the first step; below 0 where the layer started at
    zero and takes plain steps until its norm reaches the number; else the radius. That of a rule
    that averages: the second moment, below 0 before the first step.
    """

    memory: Tensor
    whole: Tensor  # whether all of the layer takes part
    constant: Tensor  # the radius of a layer that starts at zero, or the number of its weights
    step: Tensor  # number of the coming step

    def radius(self, ww: Tensor) -> Tensor:
        """The memory for a step that finds the layers at these squared norms."""
        arrived = (self.memory < 0) & (ww >= self.memory * self.memory)
        begins = (self.memory == 0) & (ww == 0)
        grown = torch.where(arrived, -self.memory, self.memory)
        now = torch.where(begins, 0.0 - self.constant, grown)
        return torch.where(self.whole, now, 0.0)  # the norm of a part of the layer is no radius

    def second_moment(self, gg: Tensor, beta: float) -> Tensor:
        """The running mean after a step of such gradients, corrected for its start."""
        square, share = gg / self.constant, (1.0 - beta) / (1.0 - beta**self.step)
        mean = self.memory + share * (square - self.memory)
        return torch.where(self.memory < 0, square, mean)


class Decision(NamedTuple):
    """``w <- a*w + b*u`` in terms of the weights as they are and the bare direction."""

    a: Tensor
    b: Tensor
    scale: LayerScale  # the rule's answer, with respect to the sums that it saw
    seen: LayerStats
    memory: Tensor


def decide(
    rule: LayerRule, config: StepConfig, sums: LayerStats, lr: Tensor, layers: Layers
) -> Decision:
    """Ask an update rule."""
    taken = config.get(TAKEN)  # 0: the step is not taken yet
    is_taken = config.values[TAKEN] != 0.0
    seen = _before_the_step(sums, taken) if is_taken else sums
    ww = seen.ww
    # the rule sees u + decay*w, whose sums follow from those of u
    decay = config.values[DECOUPLED_DECAY]
    inside = 0.0 if rule.decays_apart else decay
    seen = seen._replace(
        uu=(seen.uu + 2.0 * inside * seen.wu + inside * inside * ww).clamp(min=0.0),
        wu=seen.wu + inside * ww,
    )
    has_radius = rule.latches and rule.memory_key is not None
    memory = layers.radius(ww) if has_radius else layers.memory
    told = memory
    if rule.averages:
        beta1, beta2, eps = config.values[RULE : RULE + 3]
        memory = layers.second_moment(sums.gg, beta2)
        told = 1.0 / ((1.0 - beta1**layers.step) * (memory.sqrt() + eps))  # Adam's rate
    scale = rule.scale(seen, lr, told)
    if rule.plain_at_zero:
        share = torch.where(ww > 0, 1.0, config.get(PLAIN))
        scale = scale._replace(b=scale.b * share, scale=scale.scale * share)
    if has_radius:
        grows, plain, one = memory < 0, config.get(PLAIN), torch.ones_like(lr)
        steps = LayerScale(one, one, -(lr * plain), one * plain)
        scale = LayerScale(*(torch.where(grows, x, y) for x, y in zip(steps, scale, strict=True)))
        first = (memory == 0) & (ww > 0) & (scale.b != 0)
        memory = torch.where(first, ww.sqrt(), memory)
        # a step of nothing, as checkpoint libraries take one, leaves no trace
        memory = torch.where((lr > 0) & (seen.uu > 0), memory, layers.memory)
    scale = scale._replace(a=scale.a - lr * (decay - inside))
    a = scale.a + scale.b * inside
    b = scale.b / taken + a if is_taken else scale.b
    return Decision(a, b, scale, seen, memory)


def _before_the_step(s: LayerStats, rate: float | Tensor) -> LayerStats:
    """The sums over v and u of layers whose weights are w = v - rate*u."""
    ww = s.ww + 2.0 * s.wu + s.uu
    return LayerStats(ww.clamp(min=0.0), s.gg, s.uu / (rate * rate), (s.wu + s.uu) / rate)
