"""What a reader hands over: `Raw` arrays as stored, or `Data` ready for a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor


class DataError(ValueError):
    """A data folder or file that cannot be used; the message names it."""


@dataclass(frozen=True)
class Data:
    """Inputs and targets, train and test, ready for a model."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    meta: dict[str, object] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    def holdout(self, fraction: float = 1 / 3) -> Data:
        """The last part of the train set as test set: for choosing rates without the test set."""
        kept = len(self.x) - int(len(self.x) * fraction)
        return replace(
            self,
            name=f"{self.name}-holdout",
            x=self.x[:kept],
            y=self.y[:kept],
            test_x=self.x[kept:],
            test_y=self.y[kept:],
        )

    def some(self, items: int) -> Data:
        """At most `items` of either set, evenly spaced (files are often sorted by class)."""
        train = slice(None, None, -(-len(self.y) // items))
        test = slice(None, None, -(-len(self.test_y) // items))
        y, test_y = self.y[train], self.test_y[test]
        return replace(
            self,
            x=self.x[train],
            y=y,
            test_x=self.test_x[test],
            test_y=test_y,
            meta=self.meta | {"train": len(y), "test": len(test_y)},
        )

    def to(self, device: torch.device | str) -> Data:
        return replace(
            self,
            x=self.x.to(device),
            y=self.y.to(device),
            test_x=self.test_x.to(device),
            test_y=self.test_y.to(device),
        )


@dataclass(frozen=True)
class Raw:
    """Images as stored (N, C, H, W) with `full_scale` the value that means white."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    full_scale: float


def below(folder: Path | None, name: str, *places: str) -> Path:
    """The first of `places` that is a folder below `folder`, else `folder` itself."""
    if folder is None:
        raise DataError(f"{name} needs a folder that holds {places[0]}/")
    if not folder.is_dir():
        raise DataError(f"{name}: no folder {folder}")
    return next((folder / place for place in places if (folder / place).is_dir()), folder)
