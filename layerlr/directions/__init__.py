"""Directions: the elementwise half of an optimizer, one class a formula."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AmsGrad
from .base import Direction
from .lion import Lion
from .rmsprop import Rmsprop, RmspropCentered, RmspropCenteredMomentum, RmspropMomentum
from .sgd import AveragedMomentum, FirstMoment, Momentum, Nesterov, Sgd

#: name -> direction; the native engines assert that they know the same names
DIRECTIONS: dict[str, Direction] = {
    d.name: d
    for d in (
        Sgd(),
        Momentum(),
        Nesterov(),
        AveragedMomentum(),
        Adagrad(),
        Rmsprop(),
        RmspropCentered(),
        RmspropMomentum(),
        RmspropCenteredMomentum(),
        Adam(),
        AmsGrad(),
        Lion(),
    )
}

#: that of `layerlr.AdamMini`
FIRST_MOMENT = FirstMoment()

__all__ = ["DIRECTIONS", "FIRST_MOMENT", "Direction"]
