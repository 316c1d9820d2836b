"""What is compiled once for each header in csrc/directions: the kernels.

So a build takes as many processors as there are, and not the time of the largest file.
"""

import re
from pathlib import Path

from cuda_library import ROOT


def groups():
    """Return the directions that each header defines, as a macro's list."""
    listed = re.findall(r"X\((\w+)\)", (ROOT / "csrc/directions/all.h").read_text())
    found = {}
    for header in sorted(ROOT.glob("csrc/directions/*.h")):
        defined = re.findall(r"^struct (\w+)|^using (\w+)", header.read_text(), re.MULTILINE)
        names = [name for name in listed if any(name in pair for pair in defined)]
        if names:
            found[header.stem] = " ".join(f"X({name})" for name in names)
    return found


def parts(source):
    """Return the headers that a source is compiled for, and what it is told each time."""
    if Path(source).stem.partition("_")[0] != "kernels":
        return {}
    return {header: [f"-DLAYERLR_KERNELS_OF(X)={names}"] for header, names in groups().items()}
