"""What each object costs to compile: ``python -m bench.compile_time``.

Runs the commands of the last build one by one, into a folder that is thrown away, and adds up the
processor time of the compiler and its children; the time that other programs had the core is not
in it. CUDA sources, if that build had any (``LAYERLR_CUDA=1``), are compiled for each architecture
alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAIR = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
#: what knows neither Python nor torch, and the rest
FOLDERS = (ROOT / "build" / "ninja", ROOT / "build" / f"ninja-{PAIR}")


def commands(only: str) -> dict[str, str]:
    """The command of each object whose path matches."""
    found = {}
    for folder in FOLDERS:
        listing = subprocess.check_output(["ninja", "-C", folder, "-t", "compdb"], text=True)
        steps = json.loads(listing[listing.index("[\n") :])
        found |= {x["output"]: x["command"] for x in steps if x["output"].endswith(".o")}
    return {name: found[name] for name in sorted(found) if re.search(only, name)}


def for_architecture(command: str, architecture: str) -> str:
    """The command of a CUDA source, for one architecture and its PTX."""
    codes = f"-gencode=arch=compute_{architecture},code=[sm_{architecture},compute_{architecture}]"
    return re.sub(r"'?-gencode=\S+?\]'?(?= )", f"'{codes}'", command)


def seconds(command: str, target: str) -> float:
    """Processor time of a command."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, target).parent.mkdir(parents=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, shell=True, cwd=folder, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.compile_time", description=__doc__)
    p.add_argument("--only", default="", help="objects, by regular expression")
    p.add_argument("--architectures", default="80,90,100", help="for the CUDA sources")
    args = p.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| object | for | s |\n|---|---|---|")
    totals: dict[str, float] = {}
    for name, command in commands(args.only).items():
        cuda = name.endswith(".cu.o")
        for target in args.architectures.split(",") if cuda else ["host"]:
            spent = seconds(for_architecture(command, target) if cuda else command, name)
            totals[target] = totals.get(target, 0) + spent
            print(f"| {name} | {target} | {spent:.1f} |", flush=True)
    for target, total in totals.items():
        print(f"| all | {target} | {total:.0f} |")


if __name__ == "__main__":
    main()
