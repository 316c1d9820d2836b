"""Structural factors of back-matching: whole models, hand-computed numbers, refusals."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from functional_modules import MASK, Fn, entry, shaken
from torch import nn

from layerlr.estimators.back_matching.structural import Structure
from layerlr.estimators.replay import ModelReplay


def double(values):
    return torch.as_tensor(values, dtype=torch.float64)


def weights(layer, values):
    with torch.no_grad():
        layer.weight.copy_(double(values))
    return layer


def two_layers():
    net = nn.Sequential(nn.Linear(2, 2, False), nn.Linear(2, 1, False)).double()
    weights(net[0], [[1, 2], [-1, 1]])
    weights(net[1], [[2, -1]])
    return net, double([[1, 0], [2, 1]])


@pytest.mark.parametrize("rank, first", [(False, 0.266666666667), (True, 0.133333333333)])
def test_vector_of_the_derivation(rank, first):
    net, x = two_layers()
    factors = Structure(net, rank).factors((x,), {})
    # z = (1, -1), (4, -1): mean of |z|^2/2 = 4.75; |x|^2/2: 1.5; |W2|^2 = 5 over 2 or rank 1
    assert abs(factors[net[1].weight].item() - 4.75) < 1e-12
    assert abs(factors[net[0].weight].item() - 1.5 * (5 if rank else 2.5)) < 1e-12
    assert abs(1 / factors[net[1].weight].item() - 0.210526315789) < 1e-12
    assert abs(1 / factors[net[0].weight].item() - first) < 1e-12
    for p, f in factors.items():
        assert f.dtype == torch.float64 and f.shape == () and f.device == p.device
        assert not f.requires_grad


class Residual(nn.Module):
    def __init__(self, first, *body):
        super().__init__()
        self.first, self.body = first, nn.Sequential(*body)

    def forward(self, x):
        x = self.first(x)
        return x + self.body(x)


def test_residual_sums_add_one_to_the_product():
    a, b = 0.7, 1.3
    signs = [double(s).view(2, 2) for s in itertools.product((-1, 1), repeat=4)]
    jacobians = [torch.eye(2) + b * s2 @ (a * s1) for s1 in signs for s2 in signs]
    expected = torch.stack(jacobians).square().sum((1, 2)).mean().item() / 2
    assert expected == pytest.approx(1 + 4 * a * a * b * b)
    x = double([[1, 2], [0, -1], [3, 1]])
    for s1, s2 in zip(signs, reversed(signs)):
        body = [weights(nn.Linear(2, 2, False).double(), v) for v in (a * s1, b * s2)]
        net = Residual(nn.Linear(2, 2).double(), *body)
        factors = Structure(net).factors((x,), {})
        assert factors[net.first.bias].item() == pytest.approx(expected, rel=1e-12)
        # in the block: m of its output, then down the branch only
        z = net.first(x)
        c1 = z.square().mean().item() * 2 * b * b
        assert factors[body[0].weight].item() == pytest.approx(c1, rel=1e-12)


def test_uses_of_a_parameter_add_up():
    layer = weights(nn.Linear(2, 2, False).double(), [[1, 2], [0, -1]])
    other = nn.Linear(2, 2, False).double()
    other.weight = layer.weight
    x = double([[1, 1], [2, 0]])
    # Wx = (3, -1), (2, 0): mean of squares 14/4; x: 6/4; c_x = 6/2
    expected = 14 / 4 + 6 / 4 * 3
    for net in (nn.Sequential(layer, layer), nn.Sequential(layer, other)):
        factors = Structure(net).factors((x,), {})
        assert list(factors) == [layer.weight]
        assert factors[layer.weight].item() == pytest.approx(expected, rel=1e-12)


def test_outputs_add_up():
    def three(self, x):
        y = self.one(x)
        return {"a": y, "b": [3 * y, y, x]}

    net = Fn(three, one=nn.Linear(2, 1))
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    factors = Structure(net).factors((x,), {})
    assert factors[net.one.bias].item() == 1 + 9 + 1
    assert factors[net.one.weight].item() == pytest.approx(11 * 6 / 4)


def test_he_initialisation_gives_near_uniform_factors():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False) for _ in range(6)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    net = nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers)))[:-1]
    factors = Structure(net).factors((torch.randn(128, 64),), {})
    values = [factors[layer.weight].item() for layer in layers]
    assert 0.65 < min(values) and max(values) < 1.5, values


class ConvNet(nn.Module):
    """Most of what is known, with functions that depend on the training flag."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 4, 3)

    def forward(self, x, mask=None, scale=1):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 2)
        identity = x
        x = self.bn2(self.conv2(x))
        x += identity
        x = F.adaptive_avg_pool2d(torch.relu(x), 2)
        if mask is not None:
            x = x * mask
        x = F.dropout(x.flatten(1), 0.5, self.training)
        return F.log_softmax(self.fc(x) * scale, dim=1)


def conv_net():
    torch.manual_seed(4)
    return shaken(ConvNet(), seed=4), torch.randn(4, 3, 6, 6)


def values(model, factors):
    return {name: factors[p].item() for name, p in model.named_parameters()}


def test_single_precision_and_channels_last_agree_with_double():
    net, x = conv_net()
    net.eval()
    twin = copy.deepcopy(net).double()
    exact = values(twin, Structure(twin).factors((x.double(),), {}))
    assert len(exact) == 8
    assert values(net, Structure(net).factors((x,), {})) == pytest.approx(exact, rel=1e-5)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    factors = Structure(last).factors((x.to(memory_format=torch.channels_last),), {})
    assert values(last, factors) == pytest.approx(exact, rel=1e-5)


def test_training_flags_and_plain_arguments_are_followed():
    net, x = conv_net()
    structure = Structure(net)
    train = values(net, structure.factors((x,), {}))
    net.eval()
    evaluated = values(net, structure.factors((x,), {}))
    assert evaluated == values(net, Structure(net).factors((x,), {}))
    assert evaluated["conv2.weight"] != pytest.approx(train["conv2.weight"], rel=1e-3)

    with_mask = values(net, structure.factors((x, torch.full((4, 4, 2, 2), 3.0)), {}))
    assert with_mask["conv1.weight"] == pytest.approx(9 * evaluated["conv1.weight"], rel=0.2)
    none = values(net, structure.factors((x,), {"mask": None, "scale": 1}))
    assert none == evaluated
    scaled = values(net, structure.factors((x,), {"scale": 0}))
    assert set(scaled.values()) == {0.0}


def test_dropout_has_its_expectation():
    x = torch.ones(2000, 10)
    for drop in (nn.Dropout(0.75), Fn(lambda x: F.dropout(x, p=0.75))):
        c, _ = entry(drop, x)
        assert c == 4.0
        torch.manual_seed(0)
        measured = drop(x).square().mean().item()  # the Jacobian is the mask
        assert measured == pytest.approx(c, rel=0.05)
        assert entry(drop, x, rank=True)[0] == 16.0
    assert entry(nn.Dropout(0.75).eval(), x)[0] == 1.0
    assert entry(nn.Dropout2d(0.5), torch.ones(2, 3, 2, 2))[0] == 2.0
    assert entry(nn.Dropout(1.0), x)[0] == entry(nn.Dropout(1.0), x, rank=True)[0] == 0.0


@pytest.mark.parametrize("inplace", [False, True])
def test_replay_sees_the_same_masks_and_leaves_the_model_as_it_was(inplace):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    structure, watch = Structure(net), ModelReplay(net)
    x, seen = torch.randn(6, 4), []
    net[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    net(x).sum().backward()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    attributes, version = set(vars(net)), x._version
    with watch.replay() as (args, kwargs):
        factors = structure.factors(args, kwargs)
    with watch.replay() as (args, kwargs):
        again = structure.factors(args, kwargs)
    assert factors == again
    assert torch.equal(random, torch.get_rng_state()) and set(vars(net)) == attributes
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert x._version == version and all(p.grad is not None for p in net.parameters())
    assert all(torch.equal(seen[0], s) for s in seen) and len(seen) == 3
    mean_square = seen[0].double().square().mean().item()
    assert factors[net[4].weight].item() == pytest.approx(mean_square, rel=1e-6)


def test_what_precedes_the_first_parameter_is_free():
    net = Fn(lambda self, x: self.one(x.sort(1).values.exp() * x), one=nn.Linear(2, 1))
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert Structure(net).factors((x,), {})[net.one.bias].item() == 1.0


def test_a_model_of_one_layer_and_one_without_parameters():
    layer = nn.Linear(2, 3)
    factors = Structure(layer).factors((), {"input": torch.ones(4, 2)})
    assert len(factors) == 2 and factors[layer.bias] == 1.0
    assert factors[layer.weight].item() == pytest.approx(1.0)
    assert Structure(nn.ReLU()).factors((torch.ones(2, 2),), {}) == {}


def test_tensors_made_by_forward_do_not_stay_in_the_model():
    net = Fn(lambda self, x: self.one(x) * torch.tensor([2.0, 3.0]), one=nn.Linear(2, 2))
    attributes = set(vars(net))
    factors = Structure(net).factors((torch.ones(3, 2),), {})
    assert set(vars(net)) == attributes
    assert factors[net.one.bias].item() == (4 + 9) / 2


def test_unused_parameters_have_no_factor():
    net = Fn(lambda self, x: self.one(x), one=nn.Linear(2, 1), two=nn.LSTM(2, 2))
    assert set(Structure(net).factors((torch.ones(1, 2),), {})) == set(net.one.parameters())
    net = Fn(
        lambda self, x: (self.one(x), self.two(x).detach()),
        one=nn.Linear(2, 1),
        two=nn.Linear(2, 1),
    )
    assert set(Structure(net).factors((torch.ones(1, 2),), {})) == set(net.one.parameters())


def branches(self, x):
    if x.sum() > 0:
        return self.one(x)
    return x


def old_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.Linear(2, 2), nn.utils.weight_norm(nn.Linear(2, 2)))


def one(fn, **members):
    return lambda: Fn(fn, one=nn.Linear(2, 2), **members)


REFUSED = {
    "lstm": (lambda: nn.Sequential(nn.LSTM(2, 2)), r"'0' \(LSTM\)"),
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2))),
        r"'1.0' \(LayerNorm\)",
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(2, 2), nn.PReLU()), "PReLU"),
    "control-flow": (one(branches), "Fn.*cannot trace.*control flow"),
    "parameter": (
        one(lambda self, x: self.gain * self.one(x), gain=nn.Parameter(torch.ones(2))),
        "'gain'",
    ),
    "functional": (one(lambda self, x: F.linear(x, self.one.weight)), "'one.weight'"),
    "function": (one(lambda self, x: self.one(x).exp()), "'exp'"),
    "gate": (one(lambda self, x: self.one(x) * torch.sigmoid(self.one(x))), "'mul'.*depend"),
    "square": (one(lambda self, x: self.one(x) * self.one(x)), "'mul'.*depend"),
    "inverse": (one(lambda self, x: 1 / self.one(x)), "'truediv'.*depend"),
    "floor": (
        one(lambda self, x: torch.div(self.one(x), 2, rounding_mode="floor")),
        "'div'.*round",
    ),
    "out": (
        one(lambda self, x: torch.add(self.one(x), 1, out=self.kept), kept=nn.Buffer(MASK)),
        "'add'",
    ),
    "index": (one(lambda self, x: self.one(x)[:, 0]), "'getitem'"),
    "transpose": (one(lambda self, x: self.one(x).T), "'getattr'"),
    "random": (one(lambda self, x: self.one(x) * torch.rand(2)), "random"),
    "reflect": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")),
        "'reflect'",
    ),
    "weight-norm": (old_norm, "weight_g"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        "ParametrizedLinear|parametrizations",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_named_at_construction(name):
    make, words = REFUSED[name]
    model, random = make(), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){words}.*" + 'estimator="probe"'):
        Structure(model)
    assert torch.equal(random, torch.get_rng_state())


def overwritten(self, x):
    x = self.one(x)
    y = x.view(-1, 2)
    y.relu_()
    return x + y


def discarded(self, x):
    x = self.one(x)
    x.clamp_(0, 1)
    return x


LATE = {
    "overwritten": (one(lambda self, x: overwritten(self, x)), (3, 2), "'one'.*overwritten"),
    "discarded": (one(lambda self, x: discarded(self, x)), (3, 2), "'one'.*overwritten"),
    "inplace-residual": (
        lambda: Residual(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)),
        (3, 2),
        "'first'.*overwritten",
    ),
    "scalar": (one(lambda self, x: self.one(x).mean()), (3, 2), "output of shape"),
    "merged": (one(lambda self, x: self.one(x).flatten(0, 1)), (3, 2, 2), "output of shape"),
    "no-batch": (one(lambda self, x: self.one(x)), (2,), "'one'.*without a batch"),
    "empty": (one(lambda self, x: self.one(x)), (0, 2), "without a batch"),
    "conv-no-batch": (lambda: nn.Sequential(nn.Conv1d(2, 2, 1)), (2, 3), "'0'.*without a batch"),
    "indices": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.MaxPool1d(2, return_indices=True)),
        (3, 2, 2),
        "one tensor",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_what_is_not_known_is_named_when_it_runs(name):
    make, shape, words = LATE[name]
    structure = Structure(make())
    with pytest.raises(ValueError, match=f"(?s){words}.*" + 'estimator="probe"'):
        structure.factors((torch.randn(shape),), {})
