"""Models that compute parts of themselves once more in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import layerlr
from layerlr.rules import BackMatching, Curvature

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*create_graph", "ignore:rule 'curvature' finds the length", "ignore:None of the inputs"
)

RULES = [Curvature(kind) for kind in ("hessian", "exact", "fisher", "finite-difference")]
RULES += [BackMatching(), BackMatching(estimator="probe")]
#: what runs the model, or follows its graph, itself
WITHOUT_THE_GRAPH = ("finite-difference", "structural")


class Parts(nn.Module):
    def __init__(self, checkpointed, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.last = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
        self.checkpointed, self.reentrant = checkpointed, reentrant

    def forward(self, x):
        for name in ("first", "last"):
            part = getattr(self, name)
            again = name in self.checkpointed
            x = checkpoint(part, x, use_reentrant=self.reentrant) if again else part(x)
        return x


def rates(rule, checkpointed, reentrant=False):
    model = Parts(checkpointed, reentrant)
    x, y = torch.randn(16, 8, requires_grad=True), torch.randint(5, (16,))
    opt = layerlr.SGD(model.named_parameters(), lr=0.5, rule=rule)
    opt.attach(model)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward(create_graph=opt.is_second_order)
        return loss

    for _ in range(2):
        if rule == Curvature("finite-difference"):
            opt.step(closure)
        else:
            closure()
            opt.step()
    return opt.layer_stats()["scale"]


@pytest.mark.parametrize("checkpointed", [("first",), ("last",), ("first", "last")], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_checkpoints(rule, checkpointed):
    """Those that keep the graph change nothing; of others it is said that they do not."""
    wanted = rates(rule, ())
    torch.testing.assert_close(rates(rule, checkpointed), wanted, rtol=1e-4, atol=0)
    kind = rule.curvature if isinstance(rule, Curvature) else rule.estimator
    if kind in WITHOUT_THE_GRAPH:
        torch.testing.assert_close(rates(rule, checkpointed, True), wanted, rtol=1e-4, atol=0)
    else:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            rates(rule, checkpointed, True)


def test_gradients_that_are_constant_are_no_checkpoints():
    """The last bias under a linear loss, and what the loss does not depend on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    spare = nn.Parameter(torch.ones(3, 3))
    named = [*model.named_parameters(), ("spare", spare)]
    opt = layerlr.SGD(named, lr=0.5, rule=Curvature("hessian", damping=0.1))
    (model(torch.randn(8, 4)).mean() + 0.0 * spare.sum()).backward(create_graph=True)
    opt.step()
    assert torch.isfinite(opt.layer_stats()["scale"]).all()
