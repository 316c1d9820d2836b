"""Runs that telemetry is taken of."""

import json

import torch
from torch import nn

import layerlr

KEYS = ["ww", "gg", "uu", "wu", "scale", "lr", "angle", "skipped"]


def optimizer(rule="layca", **groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return layerlr.SGD(model.named_parameters(), lr=0.1, momentum=0.9, rule=rule, **groups)


def train(opt, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def lines(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Kept(list):
    """A callback that keeps what it is given."""

    def __call__(self, step, table):
        self.append((step, table))

    @property
    def steps(self):
        return [step for step, _ in self]
