"""What people write by the habit of another library: taken, or answered with what was meant."""

from __future__ import annotations

import pytest
import torch
from cases import copies, random, same_bits, set_grads
from selection import NONE
from torch.nn import Parameter

import layerlr

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


def weights():
    return [Parameter(v) for v in random(((4, 3), (4,)))]


@pytest.mark.parametrize("value", [0.5, [0.5, 1.0]])
@pytest.mark.parametrize("key", ["lrscale", "lr__scale"])
def test_the_name_of_a_factor_on_lr(key, value):
    """Of a number ``lr_scale`` itself is timm's, and not spoken of (`test_advice`)."""
    with pytest.warns(UserWarning, match=f"param-group key '{key}': was 'lr_factor' meant"):
        layerlr.SGD([{"params": weights(), key: value}], lr=0.1, rule="layca")


def test_amsgrad_has_its_effect_under_lamb(engine):
    """Its largest second moment is a part of u, whose direction the ratio keeps."""
    both = []
    for amsgrad in (False, True):
        params = engine.params(random(((4, 3), (4,))))
        opt = layerlr.AdamW(
            params, lr=0.1, betas=(0.5, 0.5), amsgrad=amsgrad, rule="lamb", backend=engine.backend
        )
        for seed in range(3):
            set_grads(params, seed)
            for p in params:
                p.grad *= 10.0**-seed
            opt.step()
        both.append(copies(params))
    assert not torch.equal(both[0][0], both[1][0])


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_no_clipping(engine, off):
    runs = []
    for limit in (off, None):
        params = engine.params(random(((4, 3), (4,))))
        opt = layerlr.SGD(params, lr=0.1, rule="lars", max_grad_norm=limit, backend=engine.backend)
        set_grads(params, 0)
        opt.step()
        assert opt.grad_norm is None
        runs.append(params)
    assert same_bits(runs[0], copies(runs[1]))


def test_describe_is_for_our_own():
    opt = torch.optim.SGD([Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="describe wants an optimizer of layerlr, got SGD"):
        layerlr.describe(opt)


def test_describe_returns_what_it_prints(capsys):
    text = layerlr.describe(layerlr.SGD(weights(), rule="layca"))
    assert capsys.readouterr().out == text + "\n"
