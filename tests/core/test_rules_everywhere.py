"""Rules that set norms and lengths: by vectors on every engine, sharded, from zero, on Muon."""

from __future__ import annotations

import weakref

import pytest
import torch
from cases import Engine, random, set_grads
from ranks import everywhere_the_same, full, run
from selection import EVERY, NONE
from torch import nn, tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import layerlr
from layerlr.rules import Brake, Hyperball, Lamb, Layca, Relative

#: rule, lr, step -> w, from w = [3, 4]; worked out apart from the package
ONE_STEP = [
    (Hyperball(), 0.1, [1.0, 0.0], [2.649994700016, 4.239991520025]),
    (Hyperball(radius=2.0), 0.1, [1.0, 0.0], [1.146924688727, 1.638463841038]),
    (Layca(max_angle=0.05), 0.1, [1.0, 0.0], [2.934837857305, 4.048052216972]),
    (Layca(max_angle=0.01), 0.1, [1.0, 0.0], [2.959850667913, 4.029799501669]),
    (Brake(outward=0.5), 0.5, [-1.0, 0.5], [3.455795625900, 3.702638170607]),
    (Brake(outward=0.5), 0.5, [1.0, 0.0], [2.5, 4.0]),
    # a floor of 0.35 on u/w at lr 0.1
    (Lamb(min_ratio=1 / 0.35), 0.035, [1.0, 0.0], [2.825, 4.0]),
    (Lamb(min_ratio=1 / 0.35), 0.035, [6.0, 8.0], [2.4, 3.2]),
    (Relative(), 0.1, [1.0, 0.0], [2.5, 4.0]),
]


@pytest.mark.asked(triton=EVERY)
@pytest.mark.parametrize(("rule", "lr", "step", "expected"), ONE_STEP)
def test_vectors(engine, rule, lr, step, expected):
    """To 1e-12, the built-in class and a wrapper alike."""
    for is_wrapped in (False, True):
        (w,) = engine.params([tensor([3.0, 4.0], dtype=torch.float64)])
        options = {"rule": rule, "adapt": "all", "backend": engine.backend}
        if is_wrapped:
            base = torch.optim.SGD([w], lr=0.25 if rule.sets_length else lr)
            opt = layerlr.wrap(base, **options, lr=lr)
        else:
            opt = layerlr.SGD([w], lr=lr, **options)
        w.grad = tensor(step, dtype=torch.float64).to(w)
        opt.step()
        wanted = tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(w.detach().cpu(), wanted, rtol=0, atol=1e-12)
        has_radius = "radius" in opt.state[w]
        assert has_radius == (rule.latches and not isinstance(getattr(rule, "radius", ""), float))


# -- a head that starts at zero --------------------------------------------------------------------


def head_at_zero(rule, family, engine, steps, warmup):
    """Losses of a network, and norms of its head, which starts at zero."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.arange(64) % 4
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    nn.init.zeros_(model[2].weight)
    model.to(engine.device)
    lr = 0.4 if family == "SGD" else 0.05
    opt = getattr(layerlr, family)(model.parameters(), lr=lr, rule=rule, backend=engine.backend)
    losses, norms = [], []
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(engine.device)), y.to(engine.device))
        loss.backward()
        opt.step()
        losses.append(loss.item())
        norms.append(model[2].weight.detach().norm().item())
    return losses, norms


@pytest.mark.quick(triton=NONE)
@pytest.mark.asked(triton=EVERY)
@pytest.mark.parametrize("family", ["SGD", "Adam"])
@pytest.mark.parametrize("rule", ["layca", "hyperball"])
def test_a_head_at_zero_trains_alike_on_every_engine(other, rule, family):
    """Through growth, arrival and the sphere: what the long runs of two engines show holds here."""
    steps, warmup = (40, 20) if family == "SGD" else (25, 10)
    wanted, norms = head_at_zero(rule, family, Engine("reference", "cpu"), steps, warmup)
    radius = (4 / 3) ** 0.5
    assert norms[0] < radius / 2 and norms[-1] == pytest.approx(radius, rel=1e-6)
    assert wanted[-1] < wanted[0]
    losses, reached = head_at_zero(rule, family, other, steps, warmup)
    assert losses == pytest.approx(wanted, rel=1e-9) and reached == pytest.approx(norms, rel=1e-9)


# -- sharded ---------------------------------------------------------------------------------------

SHARDED = {
    "hyperball": Hyperball(),
    "hyperball-now": Hyperball(radius="current"),
    "hyperball-1.5": Hyperball(radius=1.5),
    "relative": Relative(),
    "brake": Brake(outward=0.3),
    "cap": Layca(max_angle=0.02),
    "bounds": Lamb(min_ratio=0.6, max_ratio=1.2),
}


def _as_whole(placement, is_wrapped):
    mesh = init_device_mesh("cpu", (2,))
    values = random(((7, 5), (5,), (3, 6), (4, 4)))
    values[3].zero_()
    for rule in SHARDED.values():
        whole = [Parameter(v.clone()) for v in values]
        parts = [
            Parameter(distribute_tensor(v.clone(), mesh, [placement if v.dim() > 1 else Shard(0)]))
            for v in values
        ]

        def make(params, rule=rule):
            if is_wrapped:
                base = torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)
                return layerlr.wrap(base, rule, lr=0.1 if rule.sets_length else None)
            own = {"plain_lr": 0.02} if rule.sets_length else {}
            return layerlr.AdamW(
                params, lr=0.1 if own else 0.02, weight_decay=0.1, rule=rule, **own
            )

        opt, sharded = make(whole), make(parts)
        for step in range(4):
            set_grads(whole, step)
            for p, q in zip(whole, parts, strict=True):
                q.grad = distribute_tensor(p.grad, mesh, q.placements)
            opt.step()
            with CommDebugMode() as seen:
                sharded.step()
            assert seen.get_total_counts() == 1, rule
        for p, q in zip(whole, parts, strict=True):
            now = everywhere_the_same(full(q.detach()))
            torch.testing.assert_close(now, p.detach(), rtol=1e-9, atol=1e-12)
            if "radius" in opt.state[p]:
                mine = everywhere_the_same(sharded.state[q]["radius"])
                torch.testing.assert_close(mine, opt.state[p]["radius"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["built-in", "wrapped"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=["rows", "columns"])
def test_sharded_layers_step_as_whole_ones_with_one_message(placement, is_wrapped):
    """With plain parameters at ``plain_lr`` and a layer that starts at zero among them."""
    run(2, _as_whole, placement, is_wrapped)


# -- what a wrapped step costs ---------------------------------------------------------------------


def tensors_of(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Live(TorchDispatchMode):
    """Bytes of tensors that operators made within, as they are alive: the most at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.data_ptr() for x in tensors_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in tensors_of(out):
            if x.data_ptr() not in given:  # else a view, or written in place
                self.now += x.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(x, self.gone, x.nbytes)
        return out

    def gone(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize("rule", ["layca", "lars"])
def test_a_wrapped_step_takes_one_copy_of_what_is_governed(rule):
    """Beside what the base takes; a gradient rule forms f*g of a layer before the copy is kept."""
    params = [Parameter(v) for v in random(((64, 32), (128, 32), (32,)), torch.float32)]
    base = torch.optim.SGD(params, lr=0.1, foreach=False)
    opt = layerlr.wrap(base, rule, lr=0.05)
    for step in range(2):
        set_grads(params, step)
        opt.step()
    found = []
    for of in (base, opt):
        set_grads(params, 9)
        with Live() as live:
            of.step()
        found.append(live.most)
    governed = sum(p.nbytes for p in params if p.dim() > 1)
    small = 4096  # sums of layers, factors
    largest = max(p.nbytes for p in params)
    assert governed <= found[1] - found[0] <= governed + (largest if rule == "lars" else 0) + small


# -- MuonH -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a small transformer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up, self.down = (nn.Linear(*d, bias=False) for d in ((dim, 4 * dim), (4 * dim, dim)))

    def forward(self, x):
        shape = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Gpt(nn.Module):
    """Predicts the next of 16 symbols."""

    def __init__(self, dim=32, heads=4, blocks=2):
        super().__init__()
        self.tokens = nn.Embedding(16, dim)
        self.places = nn.Parameter(0.02 * torch.randn(24, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))
        self.head = nn.Linear(dim, 16, bias=False)

    def forward(self, x):
        x = self.tokens(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_gpt(with_rule):
    """Losses of Muon on the blocks' matrices, with or without hyperball, and AdamW on the rest."""
    torch.manual_seed(0)
    model = Gpt()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    opts = [torch.optim.AdamW(rest, lr=4e-3), muon]
    if with_rule:
        opts[1] = layerlr.wrap(muon, "hyperball", lr=0.03)
    norms = [p.detach().norm() for p in matrices]
    losses = []
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        # the next symbol is the sum of the last two
        text = torch.randint(16, (16, 25), generator=generator)
        for k in range(2, 25):
            text[:, k] = (text[:, k - 1] + text[:, k - 2]) % 16
        logits = model(text[:, :-1])
        loss = nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), text[:, 2:].flatten())
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
        losses.append(loss.item())
    return losses, norms, [p.detach().norm() for p in matrices]


@pytest.mark.full("experiments")
def test_muon_with_hyperball_trains_a_small_gpt():
    """As Muon alone does, to a small part of the loss at the start; norms stay."""
    alone, _, _ = train_gpt(False)
    losses, before, after = train_gpt(True)
    assert losses[0] == alone[0] and losses[0] > 2.5
    assert losses[-1] < losses[0] / 3
    assert losses[-1] < 2 * alone[-1] + 0.1
    torch.testing.assert_close(torch.stack(after), torch.stack(before), rtol=1e-5, atol=0)
