"""What each rule does to a layer: ``python -m bench.plot_rules docs/rules.png``."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench import picture
from bench.plot_angle import BLUE, GREY, ORANGE, arrow
from layerlr.rules import Brake, Hyperball, Lamb, Layca, LayerRule, LayerStats, Plain, Singh

WEIGHTS, STEP = (1.0, 0.0), (-0.55, -0.75)  # the step points away from 0: the norm grows

Point = tuple[float, float]


def _layer() -> tuple[Tensor, Tensor, LayerStats, Tensor]:
    """Weights, step, their sums (the gradient is the step), and a 0 for the layer."""
    w, u = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, STEP))
    sums = LayerStats(*((a @ b)[None] for a, b in ((w, w), (u, u), (u, u), (w, u))))
    return w, u, sums, torch.zeros(1, dtype=torch.float64)


def after(rule: LayerRule, lr: float) -> Point:
    """The weights after an update rule's step, by the rule's own code."""
    w, u, sums, zero = _layer()
    scale = rule.scale(sums, zero + lr, zero)
    x, y = (scale.a * w + scale.b * u).tolist()
    return x, y


def _panels() -> list[tuple[str, str, Point]]:
    """Title, what is said below, the weights after a step."""
    _, _, sums, zero = _layer()
    longer = float(Singh().factor(sums, zero + 1.0, 0.0))
    return [
        ("no rule", "lr = 1: w - u", after(Plain(), 1.0)),
        ("singh", "a longer step, the more so\nthe smaller the gradient", after(Plain(), longer)),
        ("lars, lamb", "lr = 0.5: a step of 0.5·|w|,\nalong u", after(Lamb(), 0.5)),
        ("hyperball", "lr = 0.5: the same step,\nback to the circle", after(Hyperball(), 0.5)),
        ("layca", "lr = 0.5: only the part across w;\nturned by atan(0.5)", after(Layca(), 0.5)),
        ("brake", "lr = 1: turned as without a rule,\nhalf the growth", after(Brake(), 1.0)),
    ]


def _draw(axes: Axes, title: str, text: str, to: Point) -> None:
    circle = [i / 100 * math.pi / 2 for i in range(101)]
    axes.plot([math.cos(t) for t in circle], [math.sin(t) for t in circle], color="#cccccc")
    plain = (WEIGHTS[0] - STEP[0], WEIGHTS[1] - STEP[1])
    axes.plot([1, plain[0]], [0, plain[1]], ":", color=ORANGE)
    arrow(axes, (0, 0), WEIGHTS, GREY)
    arrow(axes, WEIGHTS, to, ORANGE)
    arrow(axes, (0, 0), to, BLUE)
    axes.set_title(title, weight="bold")
    axes.text(0.95, -0.42, text, ha="center", va="center")
    axes.text(0.42, -0.12, "w", color=GREY)
    axes.text(to[0] / 2 - 0.1, to[1] / 2 + 0.12, "w after", color=BLUE, ha="right")
    axes.text(plain[0] + 0.08, plain[1] - 0.06, "w - u", color=ORANGE)
    axes.set(xlim=(-0.15, 2.1), ylim=(-0.62, 1.45), aspect="equal")
    axes.axis("off")


def plot(path: Path) -> Path:
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, _panels()):
        _draw(axes, *panel)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    picture.main("bench.plot_rules", __doc__, plot)
