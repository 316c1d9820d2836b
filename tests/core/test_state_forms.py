"""State that a user has replaced: by other tensors, numbers, nothing, at any time."""

from __future__ import annotations

import cases
import layouts
import pytest
import torch
from cases import BY_ID, copies, random, same_bits, set_grads, train
from contract_helpers import CLASSES, TWINS, assert_close, photograph, same
from selection import NONE
from torch.nn import Parameter

# Look-up and state are shared by all engines that are not the reference.
pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)

SHAPES = ((64, 64), (4, 3), (5,))


def _inference(x):
    with torch.inference_mode():
        return x.clone()


#: tensors of the same numbers, where these are all the same
FORMS = {
    "expanded": lambda x: x.flatten()[0].clone().expand(x.shape),
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
    "inference": _inference,
    "negated": lambda x: torch._neg_view(-x),
    "strided": layouts.strided,
    "inference, strided": lambda x: _inference(layouts.strided(x)),
}


def pair(engine, case, dtype=torch.float32, **options):
    """An optimizer and its parameters, twice the same."""
    values = random(SHAPES)
    both = []
    for _ in range(2):
        params = engine.params(values, dtype)
        named = [(f"layer.{i}", p) for i, p in enumerate(params)]
        both.append((engine.make(case, [{"params": named}], **options), params))
    return both


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ["adamw-none", "mom-lars", "ams-layca"])
def test_other_tensors_of_the_same_numbers(engine, row, form, in_place):
    (opt, params), (twin, others) = pair(engine, BY_ID[row])
    for o, ps in ((opt, params), (twin, others)):
        train(o, ps, 1)
        for key in ("exp_avg", "momentum_buffer"):
            if key in o.state[ps[1]]:
                o.state[ps[1]][key].zero_()
    state = opt.state[params[1]]
    for key in ("exp_avg", "momentum_buffer"):
        if key in state and in_place:
            state[key].data = FORMS[form](state[key])
        elif key in state:
            state[key] = FORMS[form](state[key])
    train(opt, params, 2, seed=1)
    train(twin, others, 2, seed=1)
    assert same_bits(params, others)
    assert same(photograph(opt)["state"], photograph(twin)["state"])


def test_conjugated_weights_and_state(engine):
    case = BY_ID["adamw-none"]
    (opt, params), (twin, others) = pair(engine, case, torch.complex64)
    train(opt, params, 1)
    train(twin, others, 1)
    for x in (params[1], *(opt.state[params[1]][key] for key in ("exp_avg", "exp_avg_sq"))):
        x.data = x.detach().conj().resolve_conj().conj()
    train(opt, params, 2, seed=1)
    train(twin, others, 2, seed=1)
    assert same_bits([p.detach().resolve_conj() for p in params], others)


@pytest.mark.parametrize(
    ("count", "same_as"),
    [
        (3, 3.0),
        (True, 1.0),
        (torch.tensor([2.0]), 2.0),
        (torch._neg_view(torch.tensor(-2.0)), 2.0),
        (torch._efficientzerotensor((), dtype=torch.float32), 0.0),
    ],
)
def test_counts_of_steps_in_any_form(engine, count, same_as):
    (opt, params), (twin, others) = pair(engine, BY_ID["adamw-none"])
    for o, ps, value in ((opt, params, count), (twin, others, torch.tensor(same_as))):
        train(o, ps, 1)
        o.state[ps[2]]["step"] = value.clone() if isinstance(value, torch.Tensor) else value
        train(o, ps, 1, seed=1)
    assert same_bits(params, others)
    assert float(opt.state[params[2]]["step"]) == same_as + 1


@pytest.mark.parametrize("count", [float("nan"), -3.0, 1e30, 2.5, float("inf")])
def test_what_is_no_count_of_steps(engine, count):
    opt, params = pair(engine, BY_ID["adamw-none"])[0]
    train(opt, params, 1)
    opt.state[params[2]]["step"] = torch.tensor(count)
    set_grads(params, 1)
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"'step' of parameter 'layer.2' is .*, wanted is the"):
        opt.step()
    assert same_bits(params, before)


@pytest.mark.parametrize(("key", "value"), [("exp_avg", 0.5), ("exp_avg", "much"), ("master", 0.5)])
def test_state_that_is_no_tensor_is_named(engine, key, value):
    opt, params = pair(engine, BY_ID["adamw-none"], torch.bfloat16, precision="master")[0]
    train(opt, params, 1)
    opt.state[params[1]][key] = value
    before = copies(params)
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match=f"{key!r} of parameter 'layer.1' is {value!r}"):
        opt.step()
    assert same_bits(params, before)


def test_a_rate_that_is_a_number(engine):
    (opt, params), (twin, others) = pair(engine, BY_ID["mom-rated"])
    opt.state[params[0]]["rate"] = 0.25
    twin.state[others[0]]["rate"].fill_(0.25)
    for o, ps in ((opt, params), (twin, others)):
        train(o, ps, 1)
    assert same_bits(params, others)


@pytest.mark.parametrize("form", [torch.Tensor.double, lambda x: x[:, :1].expand(x.shape)])
def test_scales_of_codes_in_another_form(engine, form):
    (opt, params), (twin, others) = pair(engine, BY_ID["mom-none"], state_dtype="8bit")
    for o, ps in ((opt, params), (twin, others)):
        train(o, ps, 1)
        scale = o.state[ps[0]]["momentum_buffer_scale"]
        scale.copy_(scale[:, :1].expand(scale.shape))
    state = opt.state[params[0]]
    state["momentum_buffer_scale"] = form(state["momentum_buffer_scale"])
    for o, ps in ((opt, params), (twin, others)):
        train(o, ps, 2, seed=1)
    assert same_bits(params, others)
    assert same(photograph(opt)["state"], photograph(twin)["state"])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("steps", [0, 1])
def test_weights_that_became_double_beside_state_in_fewer_bits(engine, state_dtype, steps):
    """Right, or refused by name: state of such weights is float64; float32 stays."""
    opt, params = pair(engine, BY_ID["mom-none"], state_dtype=state_dtype)[0]
    train(opt, params, steps)
    for p in params:
        p.data, p.grad = p.data.double(), None
    set_grads(params, 1)
    before = copies(params)
    try:
        opt.step()
    except RuntimeError as refused:
        assert steps and engine.backend != "reference" and "'layer." in str(refused)
        assert same_bits(params, before)
    else:
        assert not steps or engine.backend == "reference" or state_dtype == "bfloat16"
        assert all(p.isfinite().all() for p in params)


# -- where the plans do not look at each step ----------------------------------------------------


@pytest.mark.parametrize("how", ["clear", "none", "wide"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_rates_that_change_with_the_state(engine, how, has_gradient):
    """Plans that differ by rates alone are built over the state that there is."""
    (opt, params), (twin, others) = pair(engine, BY_ID["adamw-none"])
    for o, ps in ((opt, params), (twin, others)):
        state = o.state[ps[1]]
        if how == "clear" or o is twin:
            state.clear()
        else:
            state["exp_avg"] = None if how == "none" else state["exp_avg"].double()
        o.param_groups[0]["lr_factor"] = 0.5
        if o is twin:
            o.plans.rebuild_all()
        for seed in range(2):
            set_grads(ps, seed)
            if not has_gradient and seed == 0:
                ps[1].grad = None
            o.step()
    assert same_bits(params, others)


@pytest.mark.parametrize("row", ["mom-layca", "adam-mini"])
@pytest.mark.parametrize("how", ["replace", "clear"])
def test_a_layer_s_number_lies_with_a_parameter_without_gradient(engine, row, how):
    (opt, params), (twin, others) = pair(engine, BY_ID[row], layers="module", adapt="all")
    for o, ps in ((opt, params), (twin, others)):
        train(o, ps, 2)
        state, key = o.state[ps[0]], "radius" if row == "mom-layca" else "second_moment"
        if how == "clear":
            state.clear()
        elif o is opt:
            state[key] = 2 * state[key]
        else:
            state[key] *= 2
        if o is twin:
            o.plans.rebuild_all()
        set_grads(ps, 2)
        ps[0].grad = None
        o.step()
        train(o, ps, 1, seed=3)
    assert same_bits(params, others)
    assert same(photograph(opt)["state"], photograph(twin)["state"])


def test_a_number_that_no_layer_has_any_more(engine):
    params = engine.params(random([(4,)]), torch.float32)
    opt = engine.make(BY_ID["mom-layca"], params, adapt="all")
    train(opt, params, 1)
    opt.param_groups[0]["adapt"] = "kernels"
    opt.state[params[0]]["radius"] = opt.state[params[0]]["radius"].float()
    train(opt, params, 1, seed=1)
    assert opt.state[params[0]]["step"] == 2


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["expanded", "zeros"])
def test_weights_that_cannot_be_written(engine, form):
    opt, params = pair(engine, BY_ID["adamw-none"])[0]
    train(opt, params, 1)
    params[2].data = FORMS[form](params[2].detach())
    set_grads(params[:2], 1)
    params[2].grad = torch.ones(5, device=engine.device)
    before = copies(params[:2])
    with pytest.raises(ValueError, match=r"'layer\.2' holds several elements in one place"):
        opt.step()
    assert same_bits(params[:2], before)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
@pytest.mark.parametrize("ours", CLASSES)
@pytest.mark.parametrize("layout", [layouts.plain, layouts.strided])
def test_a_parameter_that_is_listed_twice_steps_twice(engine, ours, layout):
    runs = []
    for cls, options in ((ours, {"backend": engine.backend}), (TWINS[ours], {})):
        a, b = (Parameter(layout(v.to(engine.device))) for v in random(((4, 3), (5,))))
        opt = cls([a, b, a], lr=0.1, **options)
        cases.train(opt, [a, b], 3)
        runs.append([a.cpu(), b.cpu()])
    assert_close(*runs)


def test_zero_gradients_under_a_norm_that_is_nan(engine):
    """0 times NaN is NaN, for zeros without memory too."""
    opt, params = pair(engine, BY_ID["mom-none"], max_grad_norm=1.0)[0]
    set_grads(params, 0)
    params[0].grad.fill_(float("nan"))
    params[1].grad = FORMS["zeros"](params[1].detach())
    opt.step()
    assert params[1].isnan().all()
