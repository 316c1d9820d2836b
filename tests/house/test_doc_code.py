"""The code of README and docs: what needs a setting runs in it, and every name that is used exists.

Blocks that need nothing carry ``<!-- run -->`` and are run by `test_docs`. A block that needs a
model, gradients or processes carries ``<!-- run: SETTING -->``, and runs here with what that
setting defines. Of the others (other people's trainers, GPUs) the names are looked up.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import cases
import pytest
import torch
from ranks import run
from torch import nn

import layerlr

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="not the source tree")

BLOCK = re.compile(r"^(?:<!-- run(?:: ([\w ]+))? -->\n)?```python\n(.*?)^```$", re.M | re.S)
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (f"{page}-{i}", setting, code)
    for page in PAGES
    if (ROOT / page).is_file()
    for i, (setting, code) in enumerate(BLOCK.findall((ROOT / page).read_text()))
]


# -- names -----------------------------------------------------------------------------------------


class Names(ast.NodeVisitor):
    """What a block says that is not so: modules, attributes and arguments that do not exist."""

    def __init__(self, code: str) -> None:
        self.known: dict[str, object] = {"layerlr": layerlr, "torch": torch}
        self.wrong: list[str] = []
        self.absent: list[str] = []
        self.visit(ast.parse(code))

    def _module(self, name: str) -> object | None:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            self.absent.append(name)
            return None
        try:
            return importlib.import_module(name)
        except ImportError as error:
            (self.absent if error.name != name else self.wrong).append(name)
            return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = self._module(alias.name)
            if alias.asname and module is not None:
                self.known[alias.asname] = module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self._module(node.module or "")
        for alias in node.names if module is not None else ():
            if not hasattr(module, alias.name):
                self.wrong.append(f"{node.module}.{alias.name}")
            self.known[alias.asname or alias.name] = getattr(module, alias.name, None)

    def value(self, node: ast.AST) -> object | None:
        """What an expression of names and dots stands for, where that is known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        owner = self.value(node.value) if isinstance(node, ast.Attribute) else None
        if owner is None:
            return None
        found = getattr(owner, node.attr, None)
        if found is None:
            self.wrong.append(ast.unparse(node))
        return found

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.value(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.value(node.func)
        if getattr(called, "__module__", "").partition(".")[0] == "layerlr":
            takes = inspect.signature(called).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in takes and not open_ended:
                    self.wrong.append(f"{ast.unparse(node.func)}({keyword.arg}=...)")
        self.generic_visit(node)


def test_a_wrong_name_is_found():
    code = """
import torch.optim.nothing
from layerlr.monitor import Telemetry, Nothing
from no_such_package import anything
layerlr.SGD(params, lr=0.1, rule="layca", trust=1.0)
layerlr.rules.Lamb(clip=1.0, clap=2.0)
layerlr.rules.Lambda()
torch.optim.lr_scheduler.OneCycle(opt)
"""
    found = Names(code)
    assert set(found.wrong) == {
        "torch.optim.nothing",
        "layerlr.monitor.Nothing",
        "layerlr.SGD(trust=...)",
        "layerlr.rules.Lamb(clap=...)",
        "layerlr.rules.Lambda",
        "torch.optim.lr_scheduler.OneCycle",
    }
    assert found.absent == ["no_such_package"]


@pytest.mark.parametrize("code", [pytest.param(code, id=page) for page, _, code in BLOCKS])
def test_names_exist(code):
    assert not Names(code).wrong


def test_no_package_is_misspelt():
    """Packages that blocks import and that are not here are those of which docs speak."""
    absent = {name.partition(".")[0] for _, _, code in BLOCKS for name in Names(code).absent}
    assert absent <= {"timm", "torchtitan", "lightning", "transformers", "hydra", "jsonargparse"}


# -- settings --------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def step(model, opt):
    opt.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        new, old = (x.to_local() if hasattr(x, "to_local") else x for x in (p.detach(), old))
        assert new.isfinite().all() and (not new.numel() or not torch.equal(new, old))


def tensors(states):
    return [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]


def held(model, opt):
    """This process's parts of weights and state."""
    every = (*model.parameters(), *tensors(opt.state.values()))
    return [(x.to_local() if hasattr(x, "to_local") else x).detach() for x in every]


def on_a_mesh(code):
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    names = {"torch": torch, "layerlr": layerlr, "model": Model(), "mesh": mesh}
    exec(code, names)
    assert all(hasattr(p, "to_local") for p in names["model"].parameters())
    step(names["model"], names["opt"])


def with_a_sharded_optimizer(code, folder):
    """What is saved comes back, though weights and state are lost before the loading."""
    from torch.distributed import checkpoint
    from torch.distributed.fsdp import fully_shard

    load = checkpoint.load

    def lose_and_load(*args, **kwargs):
        for x in (*tensors(opt.state.values()), *model.parameters()):
            x.detach().zero_()
        load(*args, **kwargs)

    torch.manual_seed(0)
    model = Model()
    fully_shard(model)
    opt = layerlr.AdamW(model.named_parameters(), lr=2**-6, rule="lamb")
    step(model, opt)
    wanted = [x.clone() for x in held(model, opt)]
    checkpoint.load = lose_and_load  # in this process, which ends after the block
    exec(code, {"model": model, "opt": opt, "folder": folder})
    assert all(torch.equal(x, y) for x, y in zip(wanted, held(model, opt), strict=True))
    assert any(x.any() for x in wanted)
    step(model, opt)


def with_gradients(code):
    model = Model()
    opt = layerlr.AdamW(model.named_parameters(), lr=2**-6, rule="lamb")
    step(model, opt)
    names = {"torch": torch, "opt": opt}
    exec(code, names)
    step(model, type("Compiled", (), {"zero_grad": opt.zero_grad, "step": names["step"]}))


def runs(setting, code, folder):
    if setting == "on a mesh":
        run(4, on_a_mesh, code)
    elif setting == "with a sharded optimizer":
        run(2, with_a_sharded_optimizer, code, str(folder))
    else:
        assert setting == "with gradients"
        with_gradients(code)


IN_A_SETTING = [pytest.param(*rest, id=page) for page, *rest in BLOCKS if rest[0]]


@pytest.mark.parametrize(("setting", "code"), IN_A_SETTING)
def test_code_runs_in_its_setting(setting, code, tmp_path):
    runs(setting, code, tmp_path)


EXAMPLES = [*cases.CLASSES, *layerlr.rules.KNOWN.values(), layerlr.depth_multipliers]
EXAMPLES.remove(layerlr.rules.Plain)


@pytest.mark.parametrize("of", EXAMPLES, ids=lambda of: of.__name__)
def test_examples_of_docstrings(of):
    """What optimizers and rules show runs, and prints what it says."""
    names = {**vars(layerlr.rules), **vars(layerlr), "layerlr": layerlr, "torch": torch}
    names["model"] = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    found = doctest.DocTestParser().get_doctest(of.__doc__, names, of.__name__, None, None)
    assert found.examples
    printed = []
    runner = doctest.DocTestRunner()
    runner.run(found, out=printed.append)
    assert runner.failures == 0, "".join(printed)


def test_settings_are_in_use():
    assert {setting for _, setting, _ in BLOCKS if setting} == {
        "on a mesh",
        "with a sharded optimizer",
        "with gradients",
    }


def test_the_example_of_readme_runs(capsys):
    (code,) = (code for page, _, code in BLOCKS if page == "README.md-0")
    exec(code, {})
    assert "adapted" in capsys.readouterr().out
