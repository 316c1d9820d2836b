"""Figures of README and docs are those of the files that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not the source tree")

MODELS = {
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_b",
    "ViT-L/16": "vit_l",
    "GPT-2 small": "gpt2",
    "GPT-2 XL": "gpt2_xl",
    "layers that fit in L2": "l2",
    "Llama 3 8B, 16 of 32 layers": "llama3_8b_16of32",
}
FIGURE = re.compile(r"([+-]\d+\.\d+)\*{0,2} ± (\d+\.\d+)")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def tables(page: str, heading: str = "") -> list[list[list[str]]]:
    """Rows of cells of a page's tables, those below a heading alone."""
    text = read(page).partition(f"\n## {heading}\n")[2] if heading else read(page)
    found = re.findall(r"(?:^\|.*\|$\n?)+", text.partition("\n## ")[0], re.M)
    cells = [[[c.strip() for c in line[1:-1].split("|")] for line in t.splitlines()] for t in found]
    return [[row for row in table if set("".join(row)) - set("-:")] for table in cells]


def ratios(file: str, dtype: str = "float32") -> dict[tuple[str, str], float]:
    """(model, contender) -> median time over torch's fused step; the peers' best too."""
    found: dict[tuple[str, str], float] = {}
    for row in json.loads(read(f"bench/results/{file}"))["rows"]:
        if row["dtype"] != dtype or not row.get("ratio"):
            continue
        median = row["ratio"]["median"]
        found[row["model"], row["contender"]] = median
        if row["package"] in ("timm", "pytorch_optimizer"):
            best = row["model"], f"peer {row['rule']}"
            found[best] = min(found.get(best, median), median)
    return found


def contender(optimizer: str, column: str) -> str:
    """The benchmark's name of what a column shows, for SGD or Adam."""
    rule = {"no rule": "None", "lars, lamb": "lars" if optimizer == "SGD" else "lamb"}.get(column)
    if "peer" in column:
        return "peer lars" if optimizer == "SGD" else "peer lamb"
    rule = rule or column
    decoupled = optimizer == "Adam" and rule in ("None", "lamb")
    return f"layerlr {optimizer}{'W' if decoupled else ''} {rule}"


def test_times_on_a_cpu():
    known = ratios("step_time_cpu.json")
    for optimizer, table in zip(("SGD", "Adam"), tables("docs/speed.md", "On a CPU"), strict=True):
        (_, *columns), *rows = table
        assert len(rows) == 4
        for model, *cells in rows:
            for column, cell in zip(columns, cells, strict=True):
                assert cell == f"{known[MODELS[model], contender(optimizer, column)]:.2f}"


@pytest.mark.parametrize(("index", "dtype", "number"), [(0, "float32", 9), (1, "bfloat16", 7)])
def test_times_on_a_gpu(index, dtype, number):
    known = ratios("h200.json", dtype)
    (_, *models), *rows = tables("docs/speed.md", "On a GPU")[index]
    assert len(rows) == number
    for name, *cells in rows:
        wanted = name.removeprefix("layerlr ").replace(", foreach", " foreach")
        ours = "timm" not in wanted
        if ours:
            wanted = "layerlr " + wanted.replace(", no rule", " None").replace(",", "")
        for model, cell in zip(models, cells, strict=True):
            median = known.get((MODELS[model], wanted))
            assert cell == "not run" if median is None else cell == f"{median:.{1 + ours}f}"


def test_times_in_readme():
    files = {"CPU": ratios("step_time_cpu.json"), "H200": ratios("h200.json")}
    (_, *columns), *rows = tables("README.md", "Measured")[-1]
    assert len(rows) == 4
    for name, *cells in rows:
        model, optimizer, machine = name.split(", ")
        for column, cell in zip(columns, cells, strict=True):
            median = files[machine][MODELS[model], contender(optimizer, column)]
            assert cell == f"{median:.2f}", (name, column)


def test_times_of_16_bit_weights():
    known = ratios("precision_cpu.json", "bfloat16")
    ((_, *columns), *rows) = tables("docs/speed.md", "16-bit weights")[0]
    names = {"rounded to nearest": "nearest"}
    for rule, *cells in rows[1:]:
        for column, cell in zip(columns, cells, strict=True):
            way = names.get(column, column.strip('`"'))
            median = known["vit_b", f"layerlr AdamW {rule.replace('no rule', 'None')} {way}"]
            assert cell == f"{median:.2f}"


def test_sharded_steps():
    known = json.loads(read("bench/results/sharded_step_cpu.json"))["parameters"]["300"]
    ((_, *columns), messages, times) = tables("docs/speed.md", "Sharded steps")[0]
    for column, count, time in zip(columns, messages[1:], times[1:], strict=True):
        words = column.lower().replace(",", "").split()
        (row,) = (
            row
            for name, row in known.items()
            if set(words) <= set(name.lower().replace(",", "").split()) and "torch" not in name
        )
        assert int(count.replace(",", "")) == row["messages"]
        digits = len(time.partition(".")[2])
        assert time == f"{row['ratio']['median']:.{digits}f}"


def test_step_in_backward():
    known = json.loads(read("bench/results/step_in_backward_cpu.json"))
    text = " ".join(read("docs/speed.md").partition("\n## Step inside backward\n")[2].split())
    held = {name: part["step"] / 2**20 for name, part in known["memory"].items()}
    assert f"holds {held['in backward']:.0f} MiB" in text
    assert f"instead of {held['plain']:.0f}" in text
    ratio = {name: part["ratio"]["median"] for name, part in known["time"].items()}
    assert f"({ratio['in backward']:.3f} of it" in text
    assert f"beside itself {ratio['plain (A/A)']:.2f})" in text


# -- training --------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """Anchor -> text of the claim cards."""
    parts = re.split(r"^## (.+)$", read("bench/papers/results/cards.md"), flags=re.M)[1:]
    names = [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


def test_a_claim_has_the_figure_and_the_verdict_of_its_card():
    cards, seen = sections(), 0
    for row in re.findall(r"^\|.*cards\.md#.*$", read("docs/papers.md"), re.M):
        linked = re.findall(r"\*{0,2}\[([\w ]+)\]\([^)#]*cards\.md#([^)]+)\)", row)
        texts = [cards[anchor] for _, anchor in linked]
        for figure in (f"{a} ± {b}" for a, b in FIGURE.findall(row)):
            assert any(figure in text for text in texts), (row, figure)
            seen += 1
        for (verdict, _), text in zip(linked, texts, strict=True):
            assert f"**{verdict.capitalize()}**" in text, (row, verdict)
    assert seen >= 15


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_differences_are_those_of_the_cards(page):
    """To the digits that the page gives."""
    cards = [(float(a), float(b)) for a, b in FIGURE.findall(read("bench/papers/results/cards.md"))]
    found = FIGURE.findall(read(page))
    assert len(found) >= 4
    for a, b in found:
        digits = len(a.partition(".")[2])
        rounded = {(round(x, digits), round(y, digits)) for x, y in cards}
        # halves go either way
        near = {(round(x - 0.001, digits), round(y, digits)) for x, y in cards}
        assert (float(a), float(b)) in rounded | near, (a, b)


def test_the_digits_are_those_of_the_runs():
    known = {}
    for line in read("bench/papers/results/digits.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "±" in cells[2]:
            known[cells[0].lower()] = cells[2]
    ((_, *rules), *rows) = next(t for t in tables("docs/papers.md", LAYCA) if "bare" in t[0])
    assert len(rows) == 6
    for name, *cells in rows:
        for rule, cell in zip(rules, cells, strict=True):
            wanted = known.get(name.lower() + ("" if rule == "bare" else f" + {rule}"), "")
            assert cell.strip("*") == wanted, (name, rule)


LAYCA = "Carbonnelle & De Vleeschouwer 2018: Layca"
