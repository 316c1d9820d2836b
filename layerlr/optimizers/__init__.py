"""The public classes: torch.optim's constructors with a layer rule."""

from __future__ import annotations

from .adam_mini import AdamMini
from .adaptive import Adagrad, Adam, AdamW, RMSprop
from .lion import Lion
from .sgd import SGD, AMomSGD

__all__ = ["SGD", "AMomSGD", "Adagrad", "Adam", "AdamMini", "AdamW", "Lion", "RMSprop"]
