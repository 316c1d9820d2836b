"""Structural factors of back-matching against explicit Jacobians: each layer, each operation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from functional_modules import MASK, Fn, entry, identity, shaken
from torch import nn


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
