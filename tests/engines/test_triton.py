"""Triton's kernels: names, rounding, and what they compile to, without a GPU.

That they compute the right numbers is for the tests over all engines, in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

import layerlr
from layerlr import _C

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
kernels = pytest.importorskip("layerlr.kernels", reason="layerlr came without its kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# -- registries ------------------------------------------------------------------------------------


def test_directions_agree():
    assert list(kernels.DIRECTIONS) == list(layerlr.directions.DIRECTIONS)
    for name, ours in kernels.DIRECTIONS.items():
        theirs = layerlr.directions.DIRECTIONS[name]
        assert (ours.states, ours.first_order) == (len(theirs.states), theirs.first_order), name
        bits = [1 << k for k, key in enumerate(theirs.states) if key in theirs.nonnegative]
        assert ours.nonnegative == sum(bits), name


def test_rules_agree():
    assert list(kernels.RULES) == list(layerlr.rules.RULES)
    for name, ours in kernels.RULES.items():
        theirs = layerlr.rules.RULES[name]
        update = theirs.order == "update"
        weights = update or theirs.measures_ww  # an update rule takes every sum
        flags = update, weights, theirs.raw_gradient, theirs.latches, theirs.decays_apart
        assert ours[1:] == (*flags, theirs.averages, theirs.plain_at_zero), name


def test_places_of_the_numbers_agree():
    tables = importlib.import_module("layerlr.kernels.tables")
    names = {"direction": "DIRECTION_HYPER", "rule": "RULE_HYPER"}
    row = {"block": "BLOCK_SIZE", "size": "ROW"}
    for name, place in _C.ROW.items():
        assert getattr(tables, row.get(name, name.upper())) == place, name
    codes = importlib.import_module("layerlr.kernels.codes")
    assert codes.BLOCK_OF_CODES == _C.CODE_BLOCK
    for name, place in _C.CONFIG.items():
        if name != "size":
            assert getattr(tables, names.get(name, name.upper())) == place, name


@pytest.mark.skipif(not INTERPRETED, reason="asks for the tables of a plan on the CPU")
def test_bytes_of_tables_for_an_element():
    from layerlr.backends.triton import _by_kind, _tables

    def size(elements):
        p = torch.nn.Parameter(torch.zeros(elements))
        p.grad = torch.zeros_like(p)
        opt = layerlr.Adam([p], rule="layca", backend="triton")
        opt.step()
        (plan,) = opt.plans.groups[0].plans
        host = _tables(plan.spec, kernels.Blocks().elements, 1)
        kinds = _by_kind(plan.spec, host["spans"], host["tiles"], 1)
        return sum(table.nbytes for table in (*host.values(), *kinds.values()))

    elements = 16 * kernels.Blocks().elements
    assert (size(elements + 512) - size(512)) / elements < 0.02


def test_import_is_lazy():
    code = """
import sys, torch, layerlr
assert "triton" not in sys.modules
layerlr.SGD([torch.ones(1, requires_grad=True)], lr=0.1)  # torch itself imports it here
assert "layerlr.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=compiled())


# -- bfloat16 --------------------------------------------------------------------------------------


@triton.jit
def _narrow_and_widen(x, bits, back, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    narrow = kernels.arithmetic.narrow(tl.load(x + i))
    tl.store(bits + i, narrow)
    tl.store(back + i, kernels.arithmetic.widen(narrow))


def test_bfloat16():
    # every bfloat16, on and around the middle between each two of them
    device = "cpu" if INTERPRETED else "cuda"
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip(reason="neither a GPU nor TRITON_INTERPRET=1")
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (high + low[:, None]).flatten().view(torch.float32).to(device)
    bits, back = torch.zeros_like(x, dtype=torch.int16), torch.zeros_like(x)
    _narrow_and_widen[(len(low),)](x, bits, back, BLOCK=len(high))
    expected = x.bfloat16()
    nan = x.isnan()
    assert torch.equal(bits[~nan], expected[~nan].view(torch.int16))
    assert torch.equal(back[~nan].view(torch.int32), expected[~nan].float().view(torch.int32))
    assert (bits[nan] == 0x7FC0).all()


# -- as on a device: one tile a program, full tiles apart, one row a program ----------------------

SMALL = [c for c in cases.SHORT if c.id.partition("-")[2] in ("none", "lars", "layca")]
#: what `make test` has: no rule and both orders, one to three states; blocks know no more of a row
FEW = ("nag-layca", "adagrad-none", "adamw-lars", "ams-layca")
REST = pytest.mark.full("other rows of triton")


def stepped(case):
    values = cases.random(((9, 23), (70,), (4, 32), (5, 13), (0, 2)), seed=4)
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [torch.nn.Parameter(v.to(d)) for v, d in zip(values, dtypes)]
    opt = case.make(params, backend="triton")
    cases.train(opt, params[:-1], 1)
    cases.train(opt, params, 2)
    states = [v for p in params for v in cases.state_of(opt, p).values()]
    return [*cases.copies(params), *states, opt.layer_stats()["skipped"]]


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=() if c.id in FEW else REST) for c in SMALL]
)
def test_blocks(case, monkeypatch):
    expected = stepped(case)
    blocks = kernels.Blocks(elements=64, slots=2)
    monkeypatch.setattr(kernels, "INTERPRETED", blocks)
    for a, b in zip(stepped(case), expected, strict=True):
        if case.rule is None or a.dtype == torch.int64:
            assert cases.same_bits([a], [b])
        else:  # the sums are added in another order
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


# -- what they compile to --------------------------------------------------------------------------

#: direction, rule, dtype (and how states are stored), compute capability, precision if any
COMPILED = [(d, "layca", "float32", 90) for d in kernels.DIRECTIONS]
COMPILED += [("adam", r, "bfloat16", 90) for r in kernels.RULES]
COMPILED += [("nesterov", "lars", dtype, 90) for dtype in ("float64", "float16", "float32")]
COMPILED += [("momentum", "layca", "bfloat16", arch) for arch in (80, 100)]
COMPILED += [("adam", "lars", "float32", arch) for arch in (80, 100)]
COMPILED += [("adam", "layca", "bfloat16", 90, p) for p in ("master", "kahan", "stochastic")]
COMPILED += [("momentum", "lars", "float16", 90, p) for p in ("master", "kahan")]
COMPILED += [("amsgrad", r, "bfloat16 codes", 90, "stochastic") for r in ("plain", "layca")]
COMPILED += [("adam", "layca", f"float32 {states}", 90) for states in ("codes", "bfloat16")]
ROWS = ("begin", "total", "decide", "finish")


def compiled() -> dict[str, str]:
    """An environment in which Triton compiles."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def main() -> None:
    """Compile and print, line by line, what the tests look at."""
    seen = set()
    for direction, rule, dtype, arch, *held in COMPILED:
        kind = kernels.Stored(*[*dtype.split(), "plain"][:2])
        methods = kernels.launches(direction, rule, True, [kind], kernels.Blocks(), *held)
        for x in itertools.chain(*methods):
            key = (x.kernel, arch, repr(x.constants))
            if key in seen:
                continue
            seen.add(key)
            code = build(x, arch)
            row = {"kernel": x.kernel.__name__, "direction": direction, "rule": rule}
            row["precision"] = held[0] if held else "nearest"
            row |= {"states": kernels.DIRECTIONS[direction].states, "dtype": dtype, "arch": arch}
            row |= {"ptx": code.asm["ptx"], "use": usage(code)}
            print(json.dumps(row))


def build(x, arch):
    """Compile a launch for tables as the backend makes them: 16-byte aligned."""
    wide = ("lr_scale", "start_radius", "config", "scalars", "sums", "totals", "scales", "stats")
    fields = kernels.Tables._fields
    types = {"tiles": "*i32"} | dict.fromkeys(wide, "*fp64")
    signature = {"t": kernels.Tables(*(types.get(f, "*i64") for f in fields))}
    aligned = [["tt.divisibility", 16]]
    attrs = {(0, i): aligned for i in range(len(fields))}
    if x.stored is not None:
        signature["order"] = "*i32"
        attrs[1,] = aligned
    source = triton.compiler.ASTSource(
        fn=x.kernel,
        signature=signature | dict.fromkeys(x.constants, "constexpr"),
        constexprs=x.constants,
        attrs=attrs,
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=x.options)


def usage(code) -> str:
    """Registers, stack and local memory, as the tool of Triton's wheel tells them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(code.asm["cubin"])
    command = [str(tool), "-res-usage", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


ahead_of_time = pytest.mark.full("Triton ahead of time")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**compiled(), **cache, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def label(row) -> str:
    return " ".join(
        str(row[k]) for k in ("kernel", "direction", "rule", "dtype", "arch", "precision")
    )


@ahead_of_time
def test_accesses_of_16_bytes(built):
    for row in built:
        if row["kernel"] in ROWS:
            continue
        wide = "v2.b64" if row["dtype"] == "float64" else "v4.b32"
        if "codes" in row["dtype"]:
            continue  # a block that is not whole lies off every alignment
        assert f"ld.global.{wide}" in row["ptx"], label(row)
        writes = row["kernel"] == "apply" or (row["kernel"] == "advance" and row["states"])
        assert (f"st.global.{wide}" in row["ptx"]) == bool(writes), label(row)


@ahead_of_time
def test_second_pass_reads_what_it_needs(built):
    # a thread has 8 elements; momentum under layca forms u from the buffer alone
    (row,) = [r for r in built if label(r) == "apply momentum layca float32 90 nearest"]
    assert row["ptx"].count("ld.global.v4.b32") == 2 * 8 * 4 // 16
    (row,) = [r for r in built if label(r) == "apply nesterov layca float32 90 nearest"]
    assert row["ptx"].count("ld.global.v4.b32") == 3 * 8 * 4 // 16


@ahead_of_time
def test_roundings(built):
    for row in built:
        if row["kernel"] in ROWS:
            continue
        ptx = row["ptx"]
        if " codes " in label(row):  # theirs are right by any root
            ptx = re.sub(r"\bsqrt\.approx(\.ftz)?\.f32\b", "", ptx)
        # neither approximations nor flushed subnormals nor fused operations
        assert not re.search(r"\.(approx|ftz|full)\b|\bfma\.", ptx), label(row)


@ahead_of_time
def test_no_spills(built):
    """What is kept over a division of doubles may lie on the stack, once a layer."""
    found = [re.search(r"STACK:(\d+).* LOCAL:(\d+)", row["use"]) for row in built]
    if not any(found):
        pytest.skip(reason="Triton's wheel has no cuobjdump here")
    for row, use in zip(built, found):
        assert use, label(row)
        stack, local = map(int, use.groups())
        assert local == 0 and stack <= (8 if row["kernel"] in ROWS else 0), label(row)


if __name__ == "__main__":
    main()
