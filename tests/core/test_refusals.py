"""What cannot be done is refused in words that name the parameter, and changes nothing."""

from __future__ import annotations

from collections import UserDict

import cases
import pytest
import torch
from cases import SHORT, copies, ids, random, same_bits, set_grads
from contract_helpers import photograph, same
from selection import NONE
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import layerlr
from layerlr.backends import BACKENDS

# The look-up that refuses is the native engines' (native.prepare) and the reference's own.
pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)

short = pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))


# -- gradients -------------------------------------------------------------------------------------


def sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


def other_shape(p):
    p.grad = torch.ones_like(p)
    p.data = p.detach()[:2].clone()


#: no rule, a rule of either order: the look-up does not know more of them
UNUSED = [cases.BY_ID[id] for id in ("mom-none", "nag-lars", "adamw-layca")]
BAD_GRADIENTS = [
    (sparse, ["sparse", "sparse=False", "SparseAdam"]),
    (other_shape, ["shape (5, 2)", "(2, 2)"]),
]


@pytest.mark.parametrize("case", UNUSED, ids=ids(UNUSED))
@pytest.mark.parametrize(("spoil", "words"), BAD_GRADIENTS, ids=["sparse", "other_shape"])
@pytest.mark.parametrize("named", [False, True])
def test_a_gradient_that_cannot_be_used(engine, case, spoil, words, named):
    """The last of four parameters in two groups: those before it have not moved."""
    params = engine.params(random(((4, 3), (3,), (3, 3), (5, 2)), seed=3), torch.float32)
    members = list(zip("abcd", params)) if named else params
    opt = engine.make(case, [{"params": members[:2]}, {"params": members[2:]}])
    cases.train(opt, params, 1)
    set_grads(params, 1)
    spoil(params[3])
    before = photograph(opt)
    with pytest.raises(RuntimeError) as refused:
        opt.step()
    name = "'d'" if named else "'group1.param1'"
    assert all(word in str(refused.value) for word in [name, *words]), refused.value
    assert same(photograph(opt), before)


def test_a_gradient_of_another_shape_says_what_to_do(engine):
    params = engine.params(random([(5, 2)]))
    other_shape(params[0])
    with pytest.raises(RuntimeError, match="clear gradients after changing a parameter's data"):
        layerlr.SGD(params, backend=engine.backend).step()


def test_a_gradient_of_another_dtype(engine):
    """Right, or refused in words; float32 gradients of bfloat16 weights."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip(reason="this torch has no grad_dtype")
    ours = engine.params(random([(6, 5)]), torch.bfloat16)
    wide = engine.params(copies(ours), torch.float32)
    ours[0].grad_dtype = torch.float32
    ours[0].grad = random([(6, 5)], torch.float32, seed=1)[0].to(engine.device)
    wide[0].grad = ours[0].grad.clone()
    opt = layerlr.SGD([("w", ours[0])], lr=0.1, rule="layca", backend=engine.backend)
    before = photograph(opt)
    try:
        opt.step()
    except RuntimeError as refused:
        assert engine.backend != "reference"
        assert "'w'" in str(refused) and "backend='reference'" in str(refused)
        assert same(photograph(opt), before)
    else:  # the same in float32, rounded at the end
        layerlr.SGD(wide, lr=0.1, rule="layca", backend=engine.backend).step()
        assert same_bits(ours, [wide[0].detach().bfloat16()])


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", cases.CLASSES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_cannot_be_optimized(cls, dtype):
    good, bad = Parameter(torch.ones(2)), torch.zeros(2).to(dtype)
    if dtype.is_floating_point:
        bad.requires_grad_()
    else:
        bad = Parameter(bad, requires_grad=False)
    with pytest.raises(ValueError) as refused:
        cls([("fine", good), ("odd", bad)])
    assert all(word in str(refused.value) for word in ("'odd'", str(dtype), "convert it to"))


@pytest.mark.asked()
@short
def test_mixed_dtypes_in_one_group(engine, case):
    """A parameter steps as in a group of its own, whatever is beside it."""
    values = [v.to(d) for v, d in zip(random([(5, 3)] * 4 + [(4,)] * 4), cases.DTYPES * 2)]
    ours, alone = engine.params(values), engine.params(values)
    cases.train(engine.make(case, ours), ours, 2)
    for dtype in cases.DTYPES:
        mine = [p for p in alone if p.dtype == dtype]
        others = [p.detach().clone().requires_grad_() for p in alone]  # for the same gradients
        opt = engine.make(case, mine)
        for seed in range(2):
            set_grads(others, seed)
            for p, g in zip(alone, others):
                p.grad = g.grad
            opt.step()
    assert same_bits(ours, alone)


#: a complex vector is a real matrix: frozen in one, not in the other
UNFROZEN = [c for c in SHORT if getattr(c.rule, "others", "") != "freeze"]


@pytest.mark.asked()
@pytest.mark.parametrize("case", UNFROZEN, ids=ids(UNFROZEN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["complex64", "complex128"])
def test_complex_is_a_pair_of_reals(engine, case, dtype):
    values = random(((4, 3, 2), (5, 2)), dtype, seed=3)
    adapt = {"adapt": "all"} if case.rule is not None else {}
    real = engine.params(values)
    whole = [Parameter(torch.view_as_complex(p.detach().clone())) for p in real]
    opt, twin = engine.make(case, real, **adapt), engine.make(case, whole, **adapt)
    for seed in range(3):
        set_grads(real, seed)
        for p, q in zip(real, whole):
            q.grad = torch.view_as_complex(p.grad.clone())
        opt.step()
        twin.step()
    assert same_bits(real, copies(whole))


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_backend_that_does_not_support_a_case_names_those_that_do(backend):
    with pytest.raises(RuntimeError) as refused:
        layerlr.Adam([Parameter(torch.ones(2))], differentiable=True, backend=backend)
    assert f"backend {backend!r}" in str(refused.value)
    assert "use backend='reference'" in str(refused.value)


def test_wrapped_parameters_are_refused_by_name():
    p = torch.nn.Parameter(TwoTensor(torch.ones(4, 3), torch.ones(4, 3)))
    with pytest.raises(ValueError, match="parameter 'w' is a TwoTensor"):
        layerlr.SGD([("w", p)], rule="layca")


@pytest.mark.parametrize("make", [layerlr.SGD, lambda p: layerlr.wrap(torch.optim.SGD(p), "singh")])
def test_lazy_parameters_are_refused_by_name(make):
    with pytest.raises(ValueError, match="parameter: 'weight' is of a lazy module"):
        make(torch.nn.LazyLinear(3).named_parameters())


#: what may be freed of a parameter, and the options under which it has that
FREED = {
    "weights": {},
    "gradient": {},
    "exp_avg": {},
    "step": {},
    "radius": {},
    "exp_avg_scale": {"state_dtype": "8bit"},
    "master": {"precision": "master"},
    "compensation": {"precision": "kahan"},
}


#: how a tensor can lie in the memory that is freed
LYING = {
    "whole": lambda x: x,
    "a part": lambda x: torch.cat([x.flatten()] * 2)[x.numel() :].view_as(x),
    "transposed": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("what", FREED)
def test_freed_memory_is_named(engine, what, lying):
    p = engine.params([torch.ones(64, 128, dtype=torch.bfloat16)])[0]
    opt = layerlr.Adam([("w", p)], rule="layca", backend=engine.backend, **FREED[what])
    p.grad = torch.ones_like(p)
    opt.step()
    freed = {"weights": p, "gradient": p.grad, **opt.state[p]}[what]
    freed.data = LYING[lying](freed.detach())
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"'w', its {what}, was freed"):
        opt.step()


@pytest.mark.parametrize("what", FREED)
def test_memory_that_was_cut_off_is_named(engine, what):
    p = engine.params([torch.ones(64, 128, dtype=torch.bfloat16)])[0]
    opt = layerlr.Adam([("w", p)], rule="layca", backend=engine.backend, **FREED[what])
    p.grad = torch.ones_like(p)
    opt.step()
    cut = {"weights": p, "gradient": p.grad, **opt.state[p]}[what].untyped_storage()
    cut.resize_(cut.nbytes() - 2)
    with pytest.raises(RuntimeError, match=rf"its {what}, was freed \(its storage has \d+ bytes"):
        opt.step()


@pytest.mark.parametrize("value", [float("nan"), -3.0, 2.5, 1e30])
def test_a_count_that_was_overwritten_is_named(engine, value):
    if engine.backend != "cpu":
        pytest.skip(reason="only the CPU engine reads the count on the host")
    p, q = engine.params([torch.ones(4, 4), torch.ones(4, 4)])
    opt = layerlr.Adam([("w", p), ("v", q)], rule="layca", backend=engine.backend)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    opt.step()
    opt.state[q]["step"].fill_(value)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="'step' of parameter 'v'"):
        opt.step()
    assert torch.equal(p, before)


def test_state_that_is_no_dict_is_named(engine):
    p = engine.params([torch.ones(4, 4)])[0]
    opt = layerlr.Adam([("w", p)], rule="layca", backend=engine.backend)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p] = UserDict(opt.state[p])
    with pytest.raises(RuntimeError, match="state of parameter 'w' is a UserDict"):
        opt.step()


@pytest.mark.parametrize("other", [torch.complex64, "sparse"])
def test_state_of_another_kind_is_named_before_anything_changes(engine, other):
    p, q = engine.params([torch.ones(4, 4), torch.ones(4, 4)])
    opt = layerlr.Adam([("w", p), ("v", q)], rule=None, backend=engine.backend)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    opt.step()
    value = opt.state[q]["exp_avg"]
    opt.state[q]["exp_avg"] = value.to_sparse() if other == "sparse" else value.to(other)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="'exp_avg' of parameter 'v', which is"):
        opt.step()
    assert torch.equal(p, before)


def test_as_many_names_as_parameters():
    p, q = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    opt = layerlr.SGD([("w", p)], rule="layca")
    opt.param_groups[0]["params"].append(q)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="param group 0 has 1 names for 2 parameters"):
        opt.step()
