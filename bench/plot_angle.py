"""What lr means under Layca: ``python -m bench.plot_angle docs/angle.png``."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import picture

RATES = {"3⁻³": 3.0**-3, "2⁻⁵": 2.0**-5, "2⁻⁶": 2.0**-6, "3⁻⁵": 3.0**-5}
GREY, BLUE, ORANGE = "#888888", "#0072B2", "#D55E00"
LR = 0.5  # drawn: far larger than any in use


def _turn(axes: Axes) -> None:
    """The weights as a vector: a step across, then back to the circle of their norm."""
    across, angle = (1.0, LR), math.atan(LR)
    arc = [i / 100 * math.pi / 2 for i in range(101)]
    axes.plot([math.cos(t) for t in arc], [math.sin(t) for t in arc], color="#cccccc")
    for to, colour, text, at in (
        ((1, 0), GREY, "w before", (0.6, -0.09)),
        ((math.cos(angle), math.sin(angle)), BLUE, "w after: the norm is the same", (0.08, 0.53)),
    ):
        arrow(axes, (0, 0), to, colour)
        axes.text(*at, text, color=colour)
    arrow(axes, (1, 0), across, ORANGE)
    axes.text(1.04, 0.2, "the step's part\nacross w, made\nlr · |w| long", color=ORANGE)
    axes.plot([across[0], math.cos(angle)], [across[1], math.sin(angle)], ":", color=GREY)
    turned = [i / 100 * angle for i in range(101)]
    axes.plot([0.35 * math.cos(t) for t in turned], [0.35 * math.sin(t) for t in turned], "k")
    axes.text(0.38, 0.06, "atan(lr)")
    axes.set(xlim=(-0.05, 1.55), ylim=(-0.15, 1.05), aspect="equal")
    axes.axis("off")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def _sizes(axes: Axes) -> None:
    """Degrees a step; how many steps in one direction make a right angle."""
    degrees = [math.degrees(math.atan(rate)) for rate in RATES.values()]
    axes.barh(range(len(RATES)), degrees, color=BLUE, height=0.6)
    for at, angle in enumerate(degrees):
        steps = math.ceil(90 / angle)
        axes.text(angle + 0.03, at, f"{angle:.2f}°, {steps} steps to 90°", va="center")
    axes.set_yticks(range(len(RATES)), [f"lr = {n} = {r:.3g}" for n, r in RATES.items()])
    axes.invert_yaxis()
    axes.set(xlim=(0, 3.6), xlabel="degrees that a layer's weights turn in a step")
    axes.spines[["top", "right"]].set_visible(False)


def plot(path: Path) -> Path:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _turn(left)
    _sizes(right)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    picture.main("bench.plot_angle", __doc__, plot)
