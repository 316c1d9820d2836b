"""Importing this skips a module of tests where a package that ``bench`` needs is missing."""

import pytest

for package in ("sklearn", "matplotlib", "tqdm", "rich", "PIL"):
    pytest.importorskip(package, reason=f"bench needs {package}: pip install -e '.[bench]'")
