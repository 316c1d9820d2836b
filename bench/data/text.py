"""Text as windows of characters, each with the window that lies one character further."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .base import Data, DataError, below

BLOCK = 64  # characters of a window
TESTS = 512  # windows to test on


def tiny_shakespeare(folder: Path | None) -> Data:
    """FOLDER/text/tiny_shakespeare.txt or FOLDER/tiny_shakespeare.txt, characters numbered.

    The first 90% are there to learn from, a window at each character of it; of the rest `TESTS`
    windows that do not overlap are there to test on, evenly spaced. Windows are views of bytes.
    """
    path = below(folder, "tiny_shakespeare", "text") / "tiny_shakespeare.txt"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    codes = torch.tensor([number[letter] for letter in text], dtype=torch.uint8)
    cut = len(codes) * 9 // 10
    if len(codes) - cut < 2 * BLOCK:
        raise DataError(f"{path}: {len(codes)} characters are too few for windows of {BLOCK}")
    x, y = _windows(codes[:cut], 1)
    test_x, test_y = _windows(codes[cut:], BLOCK)
    chosen = torch.linspace(0, len(test_x) - 1, min(TESTS, len(test_x))).long()
    meta: dict[str, object] = {"block": BLOCK, "train": len(x), "test": len(chosen)}
    return Data("tiny_shakespeare", x, y, test_x[chosen], test_y[chosen], len(letters), meta)


def _windows(codes: Tensor, every: int) -> tuple[Tensor, Tensor]:
    both = codes.unfold(0, BLOCK + 1, every)
    return both[:, :-1], both[:, 1:]
