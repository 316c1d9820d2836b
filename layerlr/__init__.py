"""Layer-wise optimizers for PyTorch: a direction, a layer rule, one fused pass."""

from importlib.metadata import PackageNotFoundError, version

from . import integrations, monitor, rules
from .describe import describe
from .optimizers import SGD, Adagrad, Adam, AdamMini, AdamW, AMomSGD, Lion, RMSprop
from .param_groups import depth_multipliers, param_groups
from .selfcheck import selfcheck
from .step_in_backward import step_in_backward
from .wrapping import wrap

try:
    __version__ = version("layerlr")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "SGD",
    "AMomSGD",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamW",
    "Lion",
    "RMSprop",
    "depth_multipliers",
    "describe",
    "integrations",
    "monitor",
    "param_groups",
    "rules",
    "selfcheck",
    "step_in_backward",
    "wrap",
]
