"""Import this first, and torch.testing's inputs of optimizers come without its list of operators.

The list takes two seconds in each process, imports scipy.signal and leaves a million objects to the
garbage collector. The optimizers take of it a name that is defined elsewhere. A torch where they
take more, or whose infrastructure wants for a package, imports the list as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

INTERNAL = "torch.testing._internal"
LISTS = (f"{INTERNAL}.opinfo.definitions", f"{INTERNAL}.common_methods_invocations")

if not any(name in sys.modules for name in LISTS):
    stand_ins = {name: types.ModuleType(name) for name in LISTS}
    sys.modules.update(stand_ins)
    try:
        with contextlib.suppress(ImportError):
            core = importlib.import_module(f"{INTERNAL}.opinfo.core")
            stand_ins[LISTS[1]].DecorateInfo = core.DecorateInfo
            importlib.import_module(f"{INTERNAL}.common_optimizers")
    finally:
        for name in LISTS:
            del sys.modules[name]
