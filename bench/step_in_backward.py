"""Memory and time of a training step: the plain loop beside stepping in backward.

A step is forward, backward and optimizer of a GPT-2 of torch.nn modules on random tokens. Memory is
measured in a process for each arm: the most that torch held during a step on top of what was there
before (weights and state), from the profiler's record of every allocation or, on a GPU, the
allocator's own; and the process's peak resident size. Time is measured in one process in rounds of
both arms, of which the ratio counts; the plain loop runs twice (A/A), which shows what the run
cannot tell apart.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerlr
from bench import record, report, shapes
from bench.memory import extra_bytes
from bench.timing import Lane, Spread, ratios, run_rounds, timer_for

SCHEMA = 1
ARMS = ("plain", "in backward")
RULES = ("none", "singh", "lars", "layca", "lamb")
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {}}


@dataclass(frozen=True)
class Size:
    """Of a GPT-2 (Radford et al. 2019); the output layer is tied to the embedding."""

    width: int
    blocks: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024


MODELS = {
    "gpt2": Size(768, 12, 12),
    "gpt2_medium": Size(1024, 24, 16),
    "gpt2_xl": Size(1600, 48, 25),
    "mini": Size(64, 4, 2, 512, 64),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.project = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt2(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def count(name: str) -> int:
    """Parameters of a model, checked against the known total where there is one."""
    with torch.device("meta"):
        found = sum(p.numel() for p in Gpt2(MODELS[name]).parameters())
    assert name not in shapes.MODELS or found == shapes.MODELS[name][2], found
    return found


@dataclass(frozen=True)
class Case:
    model: str
    optimizer: str
    rule: str
    batch: int
    length: int
    device: str
    threads: int

    def build(self, arm: str) -> Callable[[], None]:
        """A training step of one arm, weights and data the same for both."""
        torch.manual_seed(0)
        size = MODELS[self.model]
        with torch.device(self.device):
            model = Gpt2(size)
            tokens = torch.randint(size.vocabulary, (self.batch, self.length + 1))
        rule = None if self.rule == "none" else self.rule
        make = getattr(layerlr, self.optimizer)
        optimizer = make(model.named_parameters(), lr=1e-4, rule=rule, **OPTIMIZERS[self.optimizer])
        if arm == "in backward":
            layerlr.step_in_backward(model, optimizer)

        def step() -> None:
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            del logits
            optimizer.step()
            optimizer.zero_grad()

        return step


@dataclass(frozen=True)
class Memory:
    """Bytes: at most at once in a step beyond what was there before; the process's most."""

    step: int
    resident: int


def measure_memory(case: Case, arm: str, steps: int) -> Memory:
    """In this process, which should have held nothing else before."""
    torch.set_num_threads(case.threads)
    step = case.build(arm)
    for _ in range(1 + steps):  # the first makes plans, and what libraries keep
        step()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the profiler has its own
    return Memory(max(_extra(step, torch.device(case.device)) for _ in range(steps)), resident)


def _extra(step: Callable[[], None], device: torch.device) -> int:
    extra = extra_bytes(step, device)
    if extra is not None:
        return extra
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def memory_apart(case: Case, arm: str, steps: int) -> Memory:
    """In a process of its own."""
    code = (
        "import sys, json, dataclasses; from bench import step_in_backward as b; "
        "case, arm, steps = json.loads(sys.argv[1]); "
        "print(json.dumps(dataclasses.asdict(b.measure_memory(b.Case(**case), arm, steps))))"
    )
    text = json.dumps([asdict(case), arm, steps])
    run = subprocess.run(
        [sys.executable, "-c", code, text], stdout=subprocess.PIPE, text=True, check=True
    )
    return Memory(**json.loads(run.stdout.splitlines()[-1]))


def times(case: Case, rounds: int) -> dict[str, dict[str, Spread]]:
    """Seconds of a step and its ratio to the plain loop's in the same round."""
    torch.set_num_threads(case.threads)
    names = (*ARMS, "plain (A/A)")
    lanes = [Lane(name, case.build(name)) for name in names]
    run_rounds(lanes, rounds, timer_for(torch.device(case.device)))
    return {
        lane.name: {"seconds": Spread.of(lane.seconds), "ratio": ratios(lane, lanes[0])}
        for lane in lanes
    }


def run(case: Case, rounds: int, memory_steps: int, command: Sequence[str]) -> dict[str, Any]:
    """Everything about one case."""
    torch.set_num_threads(case.threads)
    machine = report.machine_facts(torch.device(case.device), "wall", command)
    memory = {arm: memory_apart(case, arm, memory_steps) for arm in ARMS}
    plain, ours = (memory[arm] for arm in ARMS)
    timed = times(case, rounds)
    parameters = count(case.model)
    return {
        "schema": SCHEMA,
        "machine": machine,
        "case": asdict(case),
        "parameters": parameters,
        "gradient_bytes": 4 * parameters,
        "rounds": rounds,
        "memory": {arm: asdict(m) for arm, m in memory.items()},
        "saved": {"step": plain.step - ours.step, "resident": plain.resident - ours.resident},
        "time": {
            arm: {what: asdict(spread) for what, spread in found.items()}
            for arm, found in timed.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    lines = [("", "step MiB", "resident MiB", "ratio", "20-80%")]
    for arm, found in result["time"].items():
        memory, ratio = result["memory"].get(arm), found["ratio"]
        sizes = [f"{memory[k] / 2**20:.0f}" if memory else "" for k in ("step", "resident")]
        spread = f"{ratio['q20']:.2f}-{ratio['q80']:.2f}"
        lines.append((arm, *sizes, f"{ratio['median']:.3f}", spread))
    grads = f"gradients: {result['gradient_bytes'] / 2**20:.0f} MiB"
    return f"{report.columns(lines)}\n{grads}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.step_in_backward", description=__doc__)
    p.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    p.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="SGD")
    p.add_argument("--rule", choices=RULES, default="layca")
    p.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    p.add_argument("--length", type=int, default=64, help="tokens of each (default: 64)")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--threads", type=int, default=1, help="of torch's (default: 1)")
    p.add_argument("--rounds", type=int, default=9, help="of timing (default: 9)")
    p.add_argument("--memory-steps", type=int, default=2, help="of which the most counts")
    p.add_argument("--out", type=Path, help="a .json to write")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    out, rounds, steps = (args.pop(key) for key in ("out", "rounds", "memory_steps"))
    if args["device"].startswith("cuda") and not torch.cuda.is_available():
        parser().error("no CUDA device")
    if not 1 <= args["length"] <= MODELS[args["model"]].context or min(rounds, steps) < 1:
        parser().error("--length, --rounds or --memory-steps out of range")
    words = sys.argv[1:] if argv is None else argv
    command = ["python", "-m", "bench.step_in_backward", *words]
    result = run(Case(**args), rounds, steps, command)
    assert all(math.isfinite(found["seconds"]["median"]) for found in result["time"].values())
    print(table(result))
    if out is not None:
        record.write_json(out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
