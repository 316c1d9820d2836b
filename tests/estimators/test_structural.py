"""Structural factors of back-matching against explicit Jacobians and hand-computed numbers."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerlr.estimators.back_matching.structural import Structure
from layerlr.estimators.replay import ModelReplay


class Fn(nn.Module):
    """A module whose forward is the given function of its input (and of itself)."""

    def __init__(self, fn, **members):
        super().__init__()
        self.fn = fn
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fn(self, x) if self.fn.__code__.co_argcount == 2 else self.fn(x)


def identity(x, channels_last):
    """A layer that returns x; the factor of its bias is the number of positions times m."""
    n = x.shape[-1] if channels_last else x.shape[1]
    if channels_last or x.dim() == 2:
        layer = nn.Linear(n, n)
    else:
        layer = (nn.Conv1d if x.dim() == 3 else nn.Conv2d)(n, n, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(n).view_as(layer.weight))
        layer.bias.zero_()
    return layer.to(x), x[0].numel() // n


def shaken(layer, seed=0):
    """Parameters and statistics that are nowhere 0 or 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for t in itertools.chain(layer.parameters(), layer.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.2) if t.dim() < 2 else t.normal_()
    return layer


def entry(layer, x, rank=False, channels_last=False):
    """c_x of a layer, through the bias of an identity before it; and all factors."""
    first, positions = identity(x, channels_last)
    factors = Structure(nn.Sequential(first, layer), rank).factors((x,), {})
    return factors[first.bias].item() / positions, factors


def jacobian(fn, x):
    x = x.detach()
    return torch.autograd.functional.jacobian(fn, x).reshape(-1, x.numel())


def bn(kind, channels, train=True, **kwargs):
    layer = kind(channels, eps=0.3, **kwargs)
    return layer if train else layer.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (3, 4)),
    "linear-wide": (lambda: nn.Linear(2, 5, bias=False), (3, 2)),
    "linear-tokens": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (3, 2, 6)),
    "conv1d-stride": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2), (2, 2, 7)),
    "conv1d-gaps": (lambda: nn.Conv1d(2, 5, 2, stride=3), (2, 2, 8)),
    "conv1d-dilation": (lambda: nn.Conv1d(3, 2, 3, dilation=2, padding=3), (2, 3, 8)),
    "conv1d-same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 6)),
    "conv1d-valid": (lambda: nn.Conv1d(2, 3, 4, padding="valid", bias=False), (2, 2, 6)),
    "conv1d-circular": (
        lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, padding_mode="circular"),
        (2, 2, 7),
    ),
    "conv1d-wrapped": (
        lambda: nn.Conv1d(2, 2, 4, dilation=2, padding=4, padding_mode="circular"),
        (2, 2, 4),
    ),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5)),
    "conv2d-oblong": (
        lambda: nn.Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
        (2, 2, 5, 4),
    ),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 3, 4)),
    "conv2d-depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), (2, 3, 4, 3)),
    "conv2d-1x1": (lambda: nn.Conv2d(2, 5, 1, stride=2), (2, 2, 4, 4)),
    "conv2d-same": (lambda: nn.Conv2d(2, 2, (2, 3), padding="same", dilation=(3, 1)), (2, 2, 5, 4)),
    "conv2d-circular": (
        lambda: nn.Conv2d(2, 2, (4, 3), padding="same", padding_mode="circular"),
        (2, 2, 4, 5),
    ),
    "bn1d": (lambda: bn(nn.BatchNorm1d, 3), (5, 3)),
    "bn1d-positions": (lambda: bn(nn.BatchNorm1d, 3), (3, 3, 4)),
    "bn1d-plain": (lambda: bn(nn.BatchNorm1d, 3, affine=False), (5, 3)),
    "bn1d-pair": (lambda: bn(nn.BatchNorm1d, 3), (2, 3)),
    "bn2d": (lambda: bn(nn.BatchNorm2d, 2), (3, 2, 2, 3)),
    "bn2d-eval": (lambda: bn(nn.BatchNorm2d, 2, train=False), (3, 2, 2, 3)),
    "bn2d-eval-plain": (lambda: bn(nn.BatchNorm2d, 2, False, affine=False), (3, 2, 2, 3)),
    "bn2d-eval-untracked": (
        lambda: bn(nn.BatchNorm2d, 2, False, track_running_stats=False),
        (3, 2, 2, 3),
    ),
}

ACTIVATIONS = [
    *(getattr(nn, n)() for n in "ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Tanh Sigmoid".split()),
    *(getattr(nn, n)() for n in "LogSigmoid Softplus Hardsigmoid Hardswish Identity".split()),
    *(nn.LeakyReLU(0.3), nn.Hardtanh(-0.5, 0.7), nn.GELU("tanh"), nn.ReLU(inplace=True)),
]

MASK = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.5, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.0]]).double()

OPERATIONS = {
    **{f"{i}-{a}": (a, (3, 5)) for i, a in enumerate(ACTIVATIONS)},
    "F.relu": (lambda x: F.relu(x), (3, 5)),
    "F.relu-inplace": (lambda x: F.relu(x, inplace=True), (3, 5)),
    "F.relu-keyword": (lambda x: F.relu(input=x), (3, 5)),
    "F.gelu": (lambda x: F.gelu(x, approximate="tanh"), (3, 5)),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.4), (3, 5)),
    "F.softplus": (lambda x: F.softplus(x, beta=2), (3, 5)),
    "F.hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.9), (3, 5)),
    "F.sigmoid": (lambda x: F.sigmoid(x), (3, 5)),
    "torch.tanh": (lambda x: torch.tanh(x), (3, 5)),
    "torch.relu_": (lambda x: torch.relu_(x), (3, 5)),
    "x.relu": (lambda x: x.relu(), (3, 5)),
    "x.sigmoid_": (lambda x: x.sigmoid_(), (3, 5)),
    "MaxPool1d": (nn.MaxPool1d(2), (2, 3, 6)),
    "MaxPool1d-overlap": (nn.MaxPool1d(3, 1, 1), (2, 3, 6)),
    "MaxPool1d-dilation": (nn.MaxPool1d(2, 3, dilation=2, ceil_mode=True), (2, 3, 7)),
    "MaxPool2d": (nn.MaxPool2d(2), (2, 2, 4, 4)),
    "MaxPool2d-overlap": (nn.MaxPool2d((3, 2), (2, 1), (1, 0)), (2, 2, 5, 4)),
    "F.max_pool1d": (lambda x: F.max_pool1d(x, 3, stride=2), (2, 2, 7)),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2, padding=1), (2, 2, 5, 4)),
    "AdaptiveMaxPool1d": (nn.AdaptiveMaxPool1d(4), (2, 2, 7)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((2, 3)), (2, 2, 5, 4)),
    "F.adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (2, 2, 5, 4)),
    "AvgPool1d": (nn.AvgPool1d(2), (2, 3, 6)),
    "AvgPool1d-overlap": (nn.AvgPool1d(3, 1, 1), (2, 2, 5)),
    "AvgPool1d-exclusive": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), (2, 2, 7)),
    "AvgPool2d": (nn.AvgPool2d(2), (2, 2, 4, 4)),
    "AvgPool2d-ceil": (nn.AvgPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True), (2, 2, 6, 6)),
    "AvgPool2d-exclusive": (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        (2, 2, 6, 5),
    ),
    "AvgPool2d-divisor": (nn.AvgPool2d(2, 1, 1, divisor_override=3), (2, 2, 3, 4)),
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x, (2,), padding=1), (2, 2, 5)),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), (2, 2, 5, 4)),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(3), (2, 2, 7)),
    "AdaptiveAvgPool1d-up": (nn.AdaptiveAvgPool1d(5), (2, 2, 3)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, 2)), (2, 2, 5, 4)),
    "AdaptiveAvgPool2d-one": (nn.AdaptiveAvgPool2d(1), (2, 2, 5, 4)),
    "AdaptiveAvgPool2d-none": (nn.AdaptiveAvgPool2d((None, 3)), (2, 2, 5, 4)),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 4), (2, 2, 6)),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 2, 5, 4)),
    "mean": (lambda x: x.mean((2, 3)), (2, 3, 3, 2)),
    "mean-keepdim": (lambda x: x.mean(dim=-1, keepdim=True), (2, 3, 4)),
    "torch.mean": (lambda x: torch.mean(x, 1), (2, 4)),
    "Flatten": (nn.Flatten(), (2, 3, 4)),
    "Unflatten": (nn.Unflatten(1, (2, 2)), (3, 4)),
    "view": (lambda x: x.view(x.size(0), -1), (2, 3, 4)),
    "reshape": (lambda x: x.reshape(x.shape[0], x.shape[1] * 2, -1), (2, 3, 4)),
    "flatten": (lambda x: torch.flatten(x, 1).contiguous(), (2, 3, 4)),
    "permute": (lambda x: x.permute(0, 2, 1).transpose(1, 2), (2, 3, 4)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), (2, 3)),
    "shift": (lambda x: 1.5 - (x + 2), (2, 3)),
    "double": (lambda x: x + x, (2, 3)),
    "cancel": (lambda x: torch.sub(x, x, alpha=3), (2, 3)),
    "times": (lambda x: 3 * x, (2, 3)),
    "times_": (lambda x: x.mul_(0.5), (2, 3)),
    "over": (lambda x: -x / 4, (2, 3)),
    "mask": (Fn(lambda self, x: x * self.mask, mask=nn.Buffer(MASK)), (3, 4)),
    "weights": (Fn(lambda self, x: x / self.scale, scale=nn.Buffer(MASK[:1] + 1)), (3, 4)),
    "constant": (lambda x: x * torch.tensor([2.0, 3.0]), (4, 2)),
    "spread": (Fn(lambda self, x: x.mean(1, True) + self.mask, mask=nn.Buffer(MASK)), (3, 2)),
    "spread-times": (
        Fn(lambda self, x: x.mean(1, True) * self.mask, mask=nn.Buffer(MASK)),
        (3, 2),
    ),
    "cat": (lambda x: torch.cat([x, 2 * x, x], dim=1), (2, 3)),
    "stack": (lambda x: torch.stack((x, -x), 1), (2, 3)),
    "Softmax": (nn.Softmax(dim=1), (3, 4)),
    "F.softmax": (lambda x: F.softmax(x, 1), (2, 3, 2)),
    "LogSoftmax": (nn.LogSoftmax(-1), (3, 4)),
    "F.log_softmax": (lambda x: F.log_softmax(x, dim=1), (2, 3, 2)),
    "x.log_softmax": (lambda x: x.log_softmax(1), (2, 3)),
}


def operation(name):
    op, shape = OPERATIONS[name]
    torch.manual_seed(1)
    # spread wide enough for every kink
    return (op if isinstance(op, nn.Module) else Fn(op)), 3 * torch.randn(shape).double()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_trace_of_their_jacobians(name):
    make, shape = LAYERS[name]
    layer = shaken(make().double(), seed=2)
    torch.manual_seed(3)
    x = torch.randn(shape).double() + 0.3
    tokens = name == "linear-tokens"
    stale = copy.deepcopy(layer)  # what the sweep does to running statistics is not looked at
    c, factors = entry(layer, x, channels_last=tokens)
    full = jacobian(copy.deepcopy(stale), x)
    assert c == pytest.approx(full.square().sum().item() / x.numel(), rel=1e-10)

    for key, p in stale.named_parameters():

        def of_p(value, key=key):
            return torch.func.functional_call(copy.deepcopy(stale), {key: value}, (x,))

        per_sample = torch.autograd.functional.jacobian(of_p, p.detach()).flatten(1).square().sum(1)
        expected = per_sample.mean().item() / p.numel()
        assert factors[layer.get_parameter(key)].item() == pytest.approx(expected, rel=1e-10)


# Fewer inputs than outputs at a padded border: the bound, inputs of the batch against outputs.
BOUNDED = {"conv1d-stride": 2 * min(2 * 7, 3 * 5), "conv2d-same": 2 * min(2 * 20, 2 * 20)}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("bn")])
def test_layers_have_the_rank_of_their_jacobians(name):
    make, shape = LAYERS[name]
    layer = shaken(make().double(), seed=2)
    torch.manual_seed(3)
    x = torch.randn(shape).double()
    c, by_rank = entry(layer, x, rank=True, channels_last=name == "linear-tokens")
    full = jacobian(layer, x)
    rank = torch.linalg.matrix_rank(full).item()
    if name in BOUNDED:
        assert rank < BOUNDED[name] < min(full.shape) + 1
        rank = BOUNDED[name]
    assert c == pytest.approx(full.square().sum().item() / rank, rel=1e-10)
    _, by_dim = entry(layer, x, channels_last=name == "linear-tokens")
    assert by_rank[layer.weight] == by_dim[layer.weight]  # c_p always has dim(p)


def test_rank_of_batch_norm_leaves_out_what_the_statistics_take():
    torch.manual_seed(0)
    x = torch.randn(6, 2).double()
    layer = nn.BatchNorm1d(2, eps=1e-12, affine=False).double()
    c, _ = entry(layer, x, rank=True)
    full = jacobian(layer, x)
    assert torch.linalg.matrix_rank(full, atol=1e-6) == 2 * (6 - 2)
    assert c == pytest.approx(full.square().sum().item() / 8, rel=1e-9)


@pytest.mark.parametrize("rank", [False, True], ids=["dim", "rank"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_have_the_trace_of_their_jacobians(name, rank):
    op, x = operation(name)
    first, _ = identity(x, False)
    c, _ = entry(op, x, rank)
    full = jacobian(lambda v: op(first(v)), x)  # first changes no value; op may work in place
    n = max(torch.linalg.matrix_rank(full).item(), 1) if rank else x.numel()
    assert c == pytest.approx(full.square().sum().item() / n, rel=1e-10)


def test_ranks_that_the_papers_name():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4).double()
    assert entry(nn.ReLU(), x, rank=True)[0] == pytest.approx(1.0)
    assert entry(nn.MaxPool2d(2), x, rank=True)[0] == 1.0
    assert entry(nn.AvgPool2d(2), x, rank=True)[0] == pytest.approx(1 / 4)
    assert entry(nn.ReLU(), -x.abs(), rank=True)[0] == 0.0
    assert entry(nn.MaxPool2d(2), x)[0] == pytest.approx(1 / 4)
    assert entry(nn.AvgPool2d(2), x)[0] == pytest.approx(1 / 16)


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
