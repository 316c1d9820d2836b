"""Other people's registries, which want to know our classes by name.

Most frameworks take a class or its dotted path, and need nothing of this. A framework is imported
by the call that needs it.
"""

from . import timm

__all__ = ["timm"]
