"""``python -m layerlr.integrations SCRIPT ...``: a script of timm's, our classes known to it."""

import os
import runpy
import sys

from . import timm


def main() -> None:
    """Register, then be the script."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m layerlr.integrations SCRIPT [ARGUMENT ...]")
    timm.register()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # as for python SCRIPT
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
