"""The pages: links that lead somewhere; of docs/ navigation, and code that parses and runs."""

from __future__ import annotations

import ast
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import layerlr

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="not the source tree")

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
#: every page of the repository; its folder build and environments hold copies
ALL = [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")] + [
    str(path.relative_to(ROOT))
    for folder in ("docs", "bench", "csrc", "tests")
    for path in sorted((ROOT / folder).rglob("*.md"))
]
BLOCK = re.compile(r"^(<!-- run -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(code, bool(run), id=f"{page}-{i}")
    for page in PAGES
    for i, (run, code) in enumerate(BLOCK.findall((ROOT / page).read_text()))
]


def navigation() -> list[str]:
    """The pages that mkdocs.yml names, without a YAML parser."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    return re.findall(r"(?:- |: )(\S+\.md)$", nav, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub names them, and of what mkdocstrings documents."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_every_page_is_in_the_navigation_once():
    named = navigation()
    assert len(PAGES) > 15
    assert sorted(n for n in named if n.startswith("docs/")) == PAGES
    assert all((ROOT / n).is_file() for n in named)


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    assert not broken(ROOT / page)


def test_no_page_is_left_out():
    assert {"README.md", "CHANGELOG.md", "csrc/README.md", "bench/results/promises.md"} < set(ALL)
    assert set(PAGES) < set(ALL)


#: a file of the repository, named in code
FILE = re.compile(r"`((?:layerlr|csrc|kernels|tests|bench|docs|build_backend)/[\w./-]+\.\w+)`")


@pytest.mark.parametrize("page", ALL)
def test_files_that_are_named_exist(page):
    """But for ``NAME.py`` and the like, and what is built; the changelog may name what is gone."""
    named = FILE.findall((ROOT / page).read_text()) if page != "CHANGELOG.md" else []
    kept = [path for path in named if "NAME" not in path and not path.endswith(".so")]
    assert not [path for path in kept if not (ROOT / path).is_file()]


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading\n\n::: layerlr.SGD\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#a-heading) [c](other.md#layerlr.SGD) [d](https://x.org/y.md)"
    page.write_text(f"{good} [e](none.md) [f](other.md#none) [g](#none)\n")
    assert broken(page) == ["none.md", "other.md#none", "#none"]


@pytest.mark.parametrize(("code", "runs"), BLOCKS)
def test_code_parses_and_what_says_so_runs(code, runs):
    ast.parse(code)
    if runs:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, "docs", "exec"), {})


def test_blocks_of_several_pages_run():
    assert sum(block.values[1] for block in BLOCKS) >= 4


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def public(module) -> set[str]:
    return {f"{module.__name__}.{name}" for name in module.__all__}


def test_the_reference_names_all_that_is_public():
    """All of `layerlr`, every rule and monitor; names that exist."""
    text = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    heading = re.compile(r"^::: (\S+)\n    options:\n      heading: (\S+)$", re.MULTILINE)
    headings = dict(heading.findall(text))
    assert all(full.rpartition(".")[0] == short for full, short in headings.items())
    # of a function that bears its module's name the generator would take the module
    assert not named & {name_of(path) for path in (ROOT / "layerlr").rglob("*.py")}
    named = {headings.get(name, name) for name in named}
    rules = {f"layerlr.rules.{rule.__name__}" for rule in layerlr.rules.KNOWN.values()}
    assert (
        public(layerlr) - {"layerlr.rules", "layerlr.monitor", "layerlr.integrations"}
    ) | rules <= named
    for name in named:
        found = layerlr
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_every_rule_has_its_page():
    index = (ROOT / "docs/rules/index.md").read_text()
    for name in layerlr.rules.KNOWN.keys() - {"plain"}:
        pages = re.findall(rf'^\| \[`"{name}"`\]\((\w+\.md)', index, re.MULTILINE)
        assert len(pages) == 1, name
        assert f'rule="{name}"' in (ROOT / "docs/rules" / pages[0]).read_text()


def test_the_picture_of_the_rules(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    from bench import plot_rules

    points = {title: to for title, _, to in plot_rules._panels()}
    norm = {title: math.hypot(*to) for title, to in points.items()}
    assert points["no rule"] == (1.55, 0.75)
    assert norm["layca"] == pytest.approx(1.0) and norm["hyperball"] == pytest.approx(1.0)
    assert points["layca"][1] / points["layca"][0] == pytest.approx(0.5)
    assert norm["brake"] == pytest.approx((1.0 + norm["no rule"]) / 2)
    assert math.dist(points["lars, lamb"], (1, 0)) == pytest.approx(0.5)
    assert plot_rules.plot(tmp_path / "a.png").stat().st_size > 10_000
