"""The command line of a module that draws one picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def main(
    prog: str,
    description: str | None,
    plot: Callable[[Path], Path],
    argv: Sequence[str] | None = None,
) -> None:
    """Draw into the file that the command line names, and say which it was."""
    p = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    p.add_argument("path", type=Path, help="a .png to write")
    print(plot(p.parse_args(argv).path))
