"""Citation graphs of the Planetoid split, as Kipf and Welling's GCN reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Data, DataError, below
from .pickles import load_pickle


@dataclass(frozen=True, kw_only=True)
class GraphData(Data):
    """Nodes to learn from and to test on: `x` and `test_x` are their numbers in the graph."""

    features: Tensor  # (nodes, features), rows sum to 1
    edges: Tensor  # (2, edges), both directions, no loops

    def to(self, device: torch.device | str) -> GraphData:
        moved = super().to(device)
        return replace(moved, features=self.features.to(device), edges=self.edges.to(device))


def cora(folder: Path | None) -> GraphData:
    """Cora from FOLDER/planetoid, FOLDER/Cora/raw (PyTorch Geometric's) or FOLDER."""
    base = below(folder, "cora", "planetoid", "Cora/raw", "cora/raw")
    allx, tx = (_matrix(base / f"ind.cora.{part}") for part in ("allx", "tx"))
    y, ally, ty = (_matrix(base / f"ind.cora.{part}") for part in ("y", "ally", "ty"))
    index_path = base / "ind.cora.test.index"
    try:
        test = torch.tensor([int(line) for line in index_path.read_text().split()])
    except (OSError, ValueError) as error:
        raise DataError(f"{index_path}: cannot be read: {error}") from error
    nodes = len(allx) + len(tx)
    # The files list the test nodes in the order of the index, the graph by their numbers.
    if sorted(test.tolist()) != list(range(len(allx), nodes)):
        raise DataError(f"{index_path}: not the numbers {len(allx)} to {nodes - 1} of ind.cora.tx")
    if not (len(ally) == len(allx) and len(ty) == len(tx) and 0 < len(y) <= len(allx)):
        raise DataError(f"{base}: ind.cora.*: labels and features differ in number")
    if allx.shape[1] != tx.shape[1] or not y.shape[1] == ally.shape[1] == ty.shape[1]:
        raise DataError(f"{base}: ind.cora.*: train and test set differ in width")
    features, labels = torch.cat([allx, tx]), torch.cat([ally, ty])
    features[test], labels[test] = tx, ty
    labels = labels.argmax(1)
    train, test = torch.arange(len(y)), test.sort().values
    return GraphData(
        "cora",
        train,
        labels[train],
        test,
        labels[test],
        y.shape[1],
        {"scaling": "rows sum to 1", "nodes": nodes, "train": len(train), "test": len(test)},
        features=features / features.sum(1, keepdim=True).clamp(min=1e-12),
        edges=_edges(base / "ind.cora.graph", nodes),
    )


def _matrix(path: Path) -> Tensor:
    content = load_pickle(path)
    if not isinstance(content, Tensor) or content.ndim != 2 or content.numel() == 0:
        raise DataError(f"{path}: no matrix")
    return content.float()


def _edges(path: Path, nodes: int) -> Tensor:
    content: Any = load_pickle(path)
    try:
        pairs = torch.tensor([(i, j) for i, row in content.items() for j in row])
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a dict of lists of nodes: {error}") from error
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise DataError(f"{path}: not a dict of lists of nodes")
    if pairs.min() < 0 or pairs.max() >= nodes:
        raise DataError(f"{path}: an edge to node {int(pairs.max())} of {nodes}")
    pairs = torch.cat([pairs, pairs.flip(1)])
    return pairs[pairs[:, 0] != pairs[:, 1]].unique(dim=0).mT.contiguous()
