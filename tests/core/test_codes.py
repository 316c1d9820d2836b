"""Group key ``state_dtype``: state in bfloat16 and in codes of 8 bits."""

from __future__ import annotations

import copy
import io
import itertools
import math

import cases
import pytest
import torch
from cases import copies, same_bits, same_state, set_grads, state_of, train
from torch.nn import Parameter

import layerlr
from layerlr import _C, codes
from layerlr.rules import Layca

F32 = torch.float32
each_kind = pytest.mark.parametrize("kind", ["8bit", "bfloat16"])

#: rows of one block and of several, a convolution, blocks of 50 and of 49; a vector, a small kernel
#: and rows of a prime length stay float32
SHAPES = ((64, 64), (33, 192), (16, 16, 4, 8), (100, 50), (30, 147), (70,), (8, 64), (64, 67))
CODED = (True, True, True, True, True, False, False, False)


# -- every engine ----------------------------------------------------------------------------------

#: every direction with a state that can be coded; every order
PAIRS = [f"{d}-none" for d in ("mom", "nag", "amom", "adagrad", "rms", "rms-m", "adam", "ams")]
PAIRS += ["lion-none", "adam-singh", "nag-lars", "mom-layca", "adamw-lamb", "ams-layca"]
PAIRS += ["adamw-hyperball", "adamw-rated"]
FEW = ("mom-none", "adam-singh", "ams-layca", "adamw-lamb", "rms-m-none")
few = pytest.mark.asked(triton=FEW, simt=FEW)


def rows(*names):
    return pytest.mark.parametrize("case", [cases.BY_ID[n] for n in names], ids=names)


def started(engine, case, kind, weights=F32, shapes=SHAPES, **kwargs):
    case = cases.BY_ID[case] if isinstance(case, str) else case
    params = engine.params(cases.random(shapes), weights)
    return engine.make(case, params, state_dtype=kind, **kwargs), params


def set_uneven_grads(params, seed):
    """Sizes over many orders of magnitude, as those of a network."""
    set_grads(params, seed)
    for p in params:
        p.grad.mul_(p.grad.abs() ** 3)


@few
@rows(*PAIRS)
@pytest.mark.parametrize("weights", [F32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_kind
def test_all_engines_store_the_same_bits(other, case, weights, kind):
    opt, params = started(other, case, kind, weights)
    reference, theirs = started(cases.Engine("reference", "cpu"), case, kind, weights)
    for step in range(3):
        set_uneven_grads(params, step)
        set_uneven_grads(theirs, step)
        opt.step()
        reference.step()
    ruled = case.rule is not None
    for p, q in zip(params, theirs, strict=True):
        for key, value in reference.state[q].items():
            if key == "radius":  # a sum in another order
                continue
            assert same_bits([opt.state[p][key]], [value]), key
        bound = (4 if ruled else 0) * 2.0 ** (-24 if weights == F32 else -9)
        torch.testing.assert_close(p.cpu(), q, rtol=bound, atol=bound)


@rows("adam-none", "mom-layca", "ams-lamb")
@each_kind
def test_instruction_sets_store_the_same_bits(case, kind):
    found = []
    before = _C.instruction_set()
    for instructions in ("default", "avx2", "avx512"):
        try:
            _C.use_instruction_set(instructions)
        except ValueError:
            continue
        opt, params = started(cases.Engine("cpu", "cpu"), case, kind)
        for step in range(3):
            set_uneven_grads(params, step)
            opt.step()
        found.append([*copies(params), *(v for p in params for v in state_of(opt, p).values())])
    _C.use_instruction_set(before)
    assert found and all(same_bits(found[0], other) for other in found)


@few
@rows("adam-singh", "ams-layca")
def test_the_order_of_tensors_and_threads_change_no_bit(engine, case, threads):
    found = []
    for order, count in ((1, 1), (-1, 3)):
        threads(count)
        opt, params = started(engine, case, "8bit", shapes=SHAPES[::order])
        for p, value, g in zip(
            params[::order], cases.random(SHAPES), cases.random(SHAPES, seed=9), strict=True
        ):
            p.data.copy_(value)
            p.grad = g.to(p)
        opt.step()
        opt.step()
        found.append([v for p in params[::order] for v in state_of(opt, p).values()])
    assert same_bits(*found)


@few
@rows("mom-none", "ams-layca", "adamw-lamb", "adam-singh")
def test_steps_are_close_to_those_of_float32(engine, case):
    """8 bits: the codes of a momentum are 1.6% apart where they are largest."""
    opt, params = started(engine, case, "8bit")
    exact, theirs = started(engine, case, "float32")
    before = copies(params)
    for step in range(3):
        set_grads(params, step)
        set_grads(theirs, step)
        opt.step()
        exact.step()
    for p, q, old in zip(params, theirs, before, strict=True):
        assert (p - q).norm() <= 0.03 * (q - old).norm()


# -- what is coded ---------------------------------------------------------------------------------


def test_small_and_ungoverned_parameters_stay_in_float32(engine):
    opt, params = started(engine, "adam-layca", "8bit")
    for p, coded in zip(params, CODED, strict=True):
        state = opt.state[p]
        assert state["exp_avg"].dtype == (torch.int8 if coded else F32)
        assert state["exp_avg_sq"].dtype == (torch.uint8 if coded else F32)
        assert ("exp_avg_scale" in state) == coded
    free = layerlr.Adam([Parameter(torch.ones(64, 64))], state_dtype="8bit", adapt="none")
    assert free.state[free.param_groups[0]["params"][0]]["exp_avg"].dtype == F32


def test_memory_of_a_weight():
    p = Parameter(torch.ones(256, 256))
    opt = layerlr.Adam([p], state_dtype="8bit")
    held = sum(v.nbytes for k, v in opt.state[p].items() if k != "step")
    assert held / p.numel() == 2 * (1 + 4 / 64)


def test_parameters_of_float64_and_complex_ones_have_their_own(engine):
    for dtype in (torch.float64, torch.complex64):
        values = [torch.ones(64, 64, dtype=dtype)]
        opt, same = (
            layerlr.Adam(engine.params(values), backend=engine.backend, state_dtype=kind)
            for kind in ("8bit", "float32")
        )
        for o in (opt, same):
            train(o, o.param_groups[0]["params"], 2)
        (p,), (q,) = opt.param_groups[0]["params"], same.param_groups[0]["params"]
        assert same_bits([p], [q]) and same_state(state_of(opt, p), state_of(same, q))


@each_kind
def test_refusals(kind):
    p = Parameter(torch.ones(64, 64))
    with pytest.raises(ValueError, match=r"state_dtype.*centered=True.*float32"):
        layerlr.RMSprop([p], centered=True, state_dtype=kind)
    with pytest.raises(ValueError, match=r"state_dtype.*differentiable=True"):
        layerlr.SGD([p], differentiable=True, state_dtype=kind)
    with pytest.raises(ValueError, match=r"Invalid state_dtype: 'int8'.*'8bit'"):
        layerlr.SGD([p], state_dtype="int8")
    opt = layerlr.Adam([p])
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "state_dtype": None})


def test_scales_that_are_missing():
    opt = layerlr.Adam([p := Parameter(torch.ones(64, 64))], state_dtype="8bit")
    train(opt, [p], 1)
    packed = copy.deepcopy(opt.state_dict())
    del packed["state"][0]["exp_avg_scale"]
    with pytest.raises(RuntimeError, match=r"'exp_avg'.*group0\.param0.*'exp_avg_scale'"):
        opt.load_state_dict(packed)
    del opt.state[p]["exp_avg_sq_scale"]
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="exp_avg_sq_scale"):
        opt.step()


# -- what is skipped -------------------------------------------------------------------------------


@few
@rows("adam-singh", "mom-lars")
@each_kind
def test_a_skipped_layer_keeps_its_codes(engine, case, kind):
    """Under a rule that scales gradients; one that scales steps has advanced the state by then."""
    opt, params = started(engine, case, kind)
    train(opt, params, 2)
    before = [state_of(opt, p) for p in params]
    set_grads(params, 2)
    params[0].grad[0, 0] = math.nan
    opt.step()
    assert same_state(state_of(opt, params[0]), before[0])
    assert not same_state(state_of(opt, params[1]), before[1])


@few
@rows("mom-layca", "adamw-lamb")
def test_a_bad_element_keeps_its_state(other, case):
    found = []
    for engine in (other, cases.Engine("reference", "cpu")):
        opt, params = started(engine, case, "8bit")
        train(opt, params, 2)
        set_grads(params, 2)
        params[1].grad[3, 70] = math.inf
        opt.step()
        state = state_of(opt, params[1])
        key = "exp_avg" if "exp_avg" in state else "momentum_buffer"
        assert codes.load(state, key).isfinite().all()
        found.append([v for k, v in state.items() if k != "radius"])
    assert same_bits(*found)


def test_parts_of_a_tensor_that_is_split(other):
    """Of four blocks of rows, two layers each, the one with a bad gradient is left alone."""
    found = []
    for engine in (other, cases.Engine("reference", "cpu")):
        (p,) = engine.params(cases.random([(64, 64)]), F32)
        group = {"params": [p], "split": 4}
        opt = layerlr.Adam([group], rule="singh", backend=engine.backend, state_dtype="8bit")
        train(opt, [p], 1)
        before = state_of(opt, p)
        set_grads([p], 5)
        p.grad[20, 3] = math.nan
        opt.step()
        after = state_of(opt, p)
        for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
            assert same_bits([before[key][16:32]], [after[key][16:32]])
            assert not same_bits([before[key][:16]], [after[key][:16]])
        found.append(after.values())
    assert same_bits(*found)


# -- state dicts -----------------------------------------------------------------------------------


@few
@rows("adam-singh", "ams-layca")
@each_kind
def test_a_run_goes_on_to_the_bit(engine, case, kind):
    opt, params = started(engine, case, kind)
    train(opt, params, 2)
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again, copied = started(engine, case, kind)
    for p, value in zip(copied, loaded["params"], strict=True):
        p.data.copy_(value)
    again.load_state_dict(loaded["opt"])
    for o, ps in ((opt, params), (again, copied)):
        train(o, ps, 2, seed=7)
    assert same_bits(params, copied)
    for p, q in zip(params, copied, strict=True):
        assert same_state(state_of(opt, p), state_of(again, q))


@pytest.mark.parametrize(
    "old, new", list(itertools.permutations(["8bit", "bfloat16", "float32"], 2))
)
def test_state_dicts_convert(old, new):
    engine = cases.Engine("cpu", "cpu")
    opt, params = started(engine, "adam-layca", old)
    train(opt, params, 2)
    other, theirs = started(engine, "adam-layca", new)
    says = f"state_dtype='{old}' came with the state dict and replaces '{new}' in param group 0"
    with pytest.warns(UserWarning, match=says):
        other.load_state_dict(opt.state_dict())
    other.param_groups[0]["state_dtype"] = new
    train(other, theirs, 1)  # whatever was loaded, the step wants its own kind
    for p, coded in zip(theirs, CODED, strict=True):
        dtype = other.state[p]["exp_avg"].dtype
        wanted = {"8bit": torch.int8 if coded else F32, "bfloat16": torch.bfloat16, "float32": F32}
        assert dtype == wanted[new]


@each_kind
def test_a_state_dict_of_torch_loads(kind):
    p, q = Parameter(torch.ones(64, 64)), Parameter(torch.ones(64, 64))
    theirs = torch.optim.Adam([q])
    train(theirs, [q], 2)
    opt = layerlr.Adam([p], state_dtype=kind)
    opt.load_state_dict(theirs.state_dict())
    state = opt.state[p]
    torch.testing.assert_close(
        codes.load(state, "exp_avg").float(), theirs.state[q]["exp_avg"], rtol=0.3, atol=1e-4
    )
    assert state["exp_avg"].dtype in (torch.int8, torch.bfloat16)


def test_a_group_that_changes_its_mind():
    opt = layerlr.Adam([p := Parameter(torch.ones(64, 64))])
    train(opt, [p], 1)
    exact = opt.state[p]["exp_avg"].clone()
    opt.param_groups[0]["state_dtype"] = "8bit"
    train(opt, [p], 1, seed=1)
    assert opt.state[p]["exp_avg"].dtype == torch.int8
    assert (codes.load(opt.state[p], "exp_avg") - exact).norm() < 2 * exact.norm()


# -- with the rest ---------------------------------------------------------------------------------


@few
@rows("adamw-lamb")
@pytest.mark.parametrize("precision", ["master", "kahan", "stochastic"])
def test_beside_16_bit_weights(other, case, precision):
    found = []
    for engine in (other, cases.Engine("reference", "cpu")):
        opt, params = started(
            engine, case, "8bit", torch.bfloat16, precision=precision, max_grad_norm=10.0
        )
        for group in opt.param_groups:
            group["seed"] = 5
        train(opt, params, 2)
        found.append([v for p in params for k, v in state_of(opt, p).items() if "exp" in k])
    assert same_bits(*found)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "offset"])
def test_other_layouts_have_the_same_codes(other, layout):
    """Codes are those of the elements in order, wherever they lie."""
    shape = (64, 16, 4, 4) if layout == "channels_last" else (64, 128)
    (value,), (g,) = cases.random([shape], F32), cases.random([shape], F32, seed=3)
    found = []
    for strange in (False, True):
        x = value.clone()
        if strange and layout == "transposed":
            x = value.t().contiguous().t()
        elif strange and layout == "channels_last":
            x = value.contiguous(memory_format=torch.channels_last)
        elif strange:
            x = torch.empty(value.numel() + 1)[1:].view(shape).copy_(value)
        p = Parameter(x.to(other.device))
        opt = layerlr.Adam([p], rule="singh", backend=other.backend, state_dtype="8bit")
        for _ in range(2):
            p.grad = torch.empty_like(p).copy_(g)
            opt.step()
        found.append([*state_of(opt, p).values(), p.detach().contiguous()])
    assert same_bits(*found)


def test_compiled_steps_equal_eager_ones():
    torch._dynamo.reset()  # other tests have compiled the same method, which counts
    found = []
    for compiled in (False, True):
        opt, params = started(cases.Engine("cpu", "cpu"), "adam-layca", "8bit")
        step = torch.compile(opt.step, backend="eager", fullgraph=True) if compiled else opt.step
        for k in range(3):
            set_grads(params, k)
            step()
        found.append([*copies(params), *(v for p in params for v in state_of(opt, p).values())])
    assert same_bits(*found)


def test_steps_in_backward():
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)
        )
        opt = layerlr.Adam(model.named_parameters(), rule="layca", state_dtype="8bit")
        handle = layerlr.step_in_backward(model, opt) if inside else None
        for k in range(2):
            generator = torch.Generator().manual_seed(k)
            model(torch.randn(8, 64, generator=generator)).square().mean().backward()
            if not inside:
                opt.step()
            opt.zero_grad()
        del handle
        found.append([v for p in model.parameters() for v in state_of(opt, p).values()])
    assert same_bits(*found)


def test_copies_step_alike():
    opt, params = started(cases.Engine("cpu", "cpu"), "adam-layca", "8bit")
    train(opt, params, 1)
    twin, theirs = copy.deepcopy((opt, params))
    train(opt, params, 2, seed=4)
    train(twin, theirs, 2, seed=4)
    assert same_bits(params, theirs)


def test_a_rule_can_keep_its_radius_to_the_last_bit(engine):
    """The step is measured as it is stored, so layca's radius stays within float32's rounding."""
    (p,) = engine.params(cases.random([(64, 64)]), F32)
    opt = layerlr.Adam([p], lr=0.1, rule=Layca(), backend=engine.backend, state_dtype="8bit")
    radius = p.detach().double().norm().item()
    train(opt, [p], 3)
    assert p.detach().double().norm().item() == pytest.approx(radius, rel=3e-7)


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_state_of_a_layer_that_was_skipped_is_kept(state_dtype):
    """Its count is still 0, but momenta of elements with sound gradients have moved."""
    p = Parameter(torch.randn(64, 128))
    opt = layerlr.AdamW([p], rule="lamb", state_dtype=state_dtype)
    p.grad = torch.ones_like(p)
    p.grad[0, 0] = torch.nan
    opt.step()
    assert opt.state[p]["step"] == 0 and opt.state[p]["exp_avg"].any()
    other = copy.deepcopy(opt)
    (q,) = other.param_groups[0]["params"]
    assert same_state(opt.state[p], other.state[q])
