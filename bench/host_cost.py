"""Host cost of ``opt.step()`` in instructions, counted by callgrind.

    python -m bench.host_cost

Times of microseconds drown in the noise of a shared machine; instruction counts repeat exactly.
They are taken over parameters so small that arithmetic hardly shows, and their slope over the
number of parameters is the cost of one more. The module runs itself under valgrind with a C file of
client requests: both valgrind and a C compiler are needed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BASELINE = "torch SGD fused"
GATED = "layerlr SGD singh"
# Instructions that one more parameter may cost GATED: some 10% above what was measured (1,677).
LIMIT = 1_830
COUNTS = (1, 10, 100, 300)
WARMUP, STEPS = 3, 5

Table = dict[str, dict[int, int]]


def optimizers(backend: str) -> dict[str, Callable[[list[Any]], Any]]:
    """What is counted; imports wait until here, for the parent needs none of them."""
    import torch

    import layerlr

    def ours(name: str, rule: str | None, **more: float) -> Callable[[list[Any]], Any]:
        cls = getattr(layerlr, name)
        return lambda params: cls(params, lr=1e-3, rule=rule, backend=backend, **more)

    return {
        BASELINE: lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
        "layerlr SGD None": ours("SGD", None, momentum=0.9),
        GATED: ours("SGD", "singh", momentum=0.9),
        "layerlr SGD layca": ours("SGD", "layca", momentum=0.9),
        "layerlr Adam layca": ours("Adam", "layca"),
    }


NAMES = (BASELINE, "layerlr SGD None", GATED, "layerlr SGD layca", "layerlr Adam layca")


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    if sys.platform != "linux":
        return "callgrind is used on Linux only"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if _compiler() is None:
        return "there is no C compiler"
    return None


def _compiler() -> str | None:
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def count(
    names: Sequence[str] = NAMES, counts: Sequence[int] = COUNTS, backend: str = "cpu"
) -> Table:
    """Instructions per step, ``{optimizer: {number of parameters: instructions}}``."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        library = _build(Path(folder))
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, __file__]
        command += ["--worker", str(library), "--backend", backend]
        command += ["--counts", *map(str, counts), "--names", *names]
        # One thread and a fixed hash seed make counts repeat; the path finds the same layerlr.
        fixed = {
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        run = subprocess.run(command, env=os.environ | fixed, capture_output=True, text=True)
        if run.returncode != 0:
            said = [line for line in run.stderr.splitlines() if not line.startswith("==")]
            raise RuntimeError("\n".join(["the run under valgrind failed:", *said[-20:]]))
        return _read(Path(folder))


def _build(folder: Path) -> Path:
    """The client requests as a shared library. torch carries valgrind's header."""
    import torch

    header = Path(torch.__file__).parent / "utils/benchmark/utils/valgrind_wrapper"
    library = folder / "requests.so"
    source = Path(__file__).with_name("callgrind.c")
    command = [str(_compiler()), "-shared", "-fPIC", "-O1", f"-I{header}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def _read(folder: Path) -> Table:
    """The totals of callgrind's dumps, each of which carries the name it was given."""
    result: Table = {}
    for dump in sorted(folder.glob("out.*")):
        text = dump.read_text()
        label = re.search(r"^desc: Trigger: Client Request: (.+)/(\d+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if label and total:
            result.setdefault(label[1], {})[int(label[2])] = int(total[1]) // STEPS
    return {name: result[name] for name in NAMES if name in result}


def worker(library: str, names: Sequence[str], counts: Sequence[int], backend: str) -> None:
    """Runs under valgrind: a dump for every optimizer and number of parameters."""
    import torch

    torch.set_num_threads(1)
    requests = ctypes.CDLL(library)
    table = optimizers(backend)
    for name in names:
        for n in counts:
            params = [torch.full((2, 4), 0.5, requires_grad=True) for _ in range(n)]
            for p in params:
                p.grad = torch.full((2, 4), 0.01)
            opt = table[name](params)
            for _ in range(WARMUP):
                opt.step()
            gc.collect()
            gc.disable()
            requests.count_from_here()
            for _ in range(STEPS):
                opt.step()
            requests.count_until_here(f"{name}/{n}".encode())
            gc.enable()


def per_parameter(counts: dict[int, int]) -> float:
    """Slope from 10 parameters, or the least, to the most."""
    low, high = min(counts, key=lambda n: abs(n - 10)), max(counts)
    return (counts[high] - counts[low]) / (high - low)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.host_cost", description="Instructions per opt.step()."
    )
    p.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    p.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="of parameters")
    p.add_argument("--backend", default="cpu", help="of layerlr (default: cpu)")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.worker:
        worker(args.worker, args.names, args.counts, args.backend)
        return 0
    reason = why_not()
    if reason is not None:
        print(f"not counted: {reason}")
        return 1
    table = count(args.names, args.counts, args.backend)
    print(f"{'instructions per step':24}" + "".join(f"{n:>12,}" for n in args.counts), end="")
    print(f"{'per param':>12}")
    for name, counts in table.items():
        print(f"{name:24}" + "".join(f"{counts[n]:>12,}" for n in args.counts), end="")
        print(f"{per_parameter(counts):>12,.0f}")
    if GATED in table:
        slope = per_parameter(table[GATED])
        print(f"{'met' if slope <= LIMIT else 'MISSED'}: {GATED} {slope:,.0f} <= {LIMIT:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
