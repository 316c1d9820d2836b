"""A character-level GPT: learnt positions, norms before attention and perceptron."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVIATION = 0.02  # of every matrix at the start, as in GPT-2


class GPT(nn.Module):
    """Batches of characters (B, T), as bytes -> logits (B, T, classes).

    The head is a matrix of its own. Matrices that add to the residual stream start smaller by
    ``sqrt(2 * depth)``, those of the blocks larger by `norms`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int = 4,
        norms: float = 1.0,
    ) -> None:
        super().__init__()
        (block,) = shape
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads, block) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=DEVIATION / (2 * depth) ** 0.5 * adds or DEVIATION)
                if matrix(name):
                    parameter.data *= norms
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x.long()) + self.positions.weight
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    """Attention to what came before, then a perceptron of four times the width."""

    future: Tensor

    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("future", torch.full((block, block), -torch.inf).triu(1), False)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Written out, as torch's own can neither be mapped everywhere nor derived twice."""
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3 * self.heads, -1).transpose(1, 2)
        q, k, v = parts.chunk(3, 1)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + self.future
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of a character."""
    return F.cross_entropy(output.flatten(0, 1), y.flatten().long())


def matrix(name: str) -> bool:
    """Whether a parameter is a matrix between activations, as a rule for layers wants it."""
    return name.startswith("blocks.") and name.endswith(
        ("qkv.weight", "out.weight", "up.weight", "down.weight")
    )
