"""tqdm's progress bar, or nothing but the text where tqdm is not installed."""

from __future__ import annotations

from typing import Any

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:  # type: ignore[no-redef]
        """As much of tqdm as the benchmarks use, silent but for `write`."""

        def __init__(self, total: int = 0, **_: Any) -> None:
            self.total = total

        def __enter__(self) -> tqdm:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def set_description(self, text: str) -> None:
            pass

        def update(self, n: int = 1) -> None:
            pass

        def write(self, text: str) -> None:
            print(text)


__all__ = ["tqdm"]
