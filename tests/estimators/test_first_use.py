"""What users meet first when a rule looks at their model: attention, tuples, their own rate."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import layerlr
from layerlr.estimators.replay import output_tensor
from layerlr.rules import BackMatching, Curvature

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")


class Attention(nn.Module):
    """A block that returns logits, or logits and loss as nanoGPT does."""

    def __init__(self, both):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)
        self.both = both

    def forward(self, x, y):
        q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(x + self.out(mixed.transpose(1, 2).reshape(2, 6, 8)))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return (logits, loss) if self.both else {"logits": logits, "loss": loss}


def step(rule, both=False, closure=False, lr=1.0):
    """A step on attention; the weights after it."""
    model = Attention(both)
    opt = layerlr.SGD(model.named_parameters(), lr=lr, layers="module", rule=rule)
    opt.attach(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 8, generator=generator)
    y = torch.randint(5, (2, 6), generator=generator)

    def evaluate():
        opt.zero_grad()
        answer = model(x, y)
        loss = answer[1] if both else answer["loss"]
        loss.backward(create_graph=opt.is_second_order)
        return loss

    if closure:
        opt.step(evaluate)
    else:
        evaluate()
        opt.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["hessian", "exact"])
def test_fused_attention_has_no_second_derivative(kind):
    """The error says what to do, and that works."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError) as refused:
        step(Curvature(kind))
    message = str(refused.value)
    assert "rule 'curvature' differentiates twice" in message
    assert "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)" in message
    assert "Curvature('fisher')" in message
    with sdpa_kernel(SDPBackend.MATH):
        moved = step(Curvature(kind))
    start = Attention(False).parameters()
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(moved, start))


def test_other_errors_of_the_backward_pass_are_left_alone():
    with pytest.raises(RuntimeError, match="found gradients without their graph"):
        model = Attention(False)
        opt = layerlr.SGD(model.parameters(), lr=1.0, rule="curvature")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()


@pytest.mark.parametrize(
    ("rule", "closure"),
    [
        (Curvature("fisher"), False),
        (Curvature("finite-difference"), True),
        (BackMatching("probe"), False),
    ],
    ids=["fisher", "finite-difference", "probe"],
)
def test_logits_and_loss_in_a_tuple(rule, closure):
    """The step is that of a model which names its logits."""
    named, both = (step(rule, both, closure) for both in (False, True))
    assert all(torch.equal(p, q) for p, q in zip(named, both, strict=True))
    start = Attention(False).parameters()
    assert any(not torch.equal(p, q) for p, q in zip(named, start, strict=True))


def test_which_of_a_tuple():
    logits, loss = torch.ones(2, 3), torch.tensor(1.0)
    for answer in ((logits, loss), (loss, logits), (logits, None), (logits, (logits, logits))):
        assert output_tensor(answer) is logits
    for answer in ((logits, logits), (loss,), ()):
        with pytest.raises(TypeError, match="or a tuple in which one tensor has a batch dimension"):
            output_tensor(answer)


# -- a rate that is not the rule's -----------------------------------------------------------------


def said(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layerlr.SGD(Attention(False).named_parameters(), **options)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("rule", ["curvature", Curvature("fisher")])
def test_a_rate_other_than_1_is_spoken_of(rule):
    (message,) = said(rule=rule)
    assert "lr=0.001 is a factor on it: pass lr=1 and layers='module'" in message
    (message,) = said(rule=rule, lr=0.5, layers="module")
    assert "lr=0.5 is a factor on it: pass lr=1 to have" in message
    assert said(rule=rule, lr=1.0) == said(rule=rule, lr=1) == []
    assert said(rule=rule, adapt="none") == []
    assert said(rule="backmatching") == said(rule="rated") == []


def test_a_schedule_is_not_spoken_of():
    model = Attention(False)
    opt = layerlr.SGD(model.named_parameters(), lr=1.0, rule=Curvature("fisher"))
    opt.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.lr_scheduler.LinearLR(opt, 0.1)
        model(torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.long))["loss"].backward()
        opt.step()
