"""Our classes by configuration alone, in other people's loops.

The configurations are those of docs/loops.md, read from there. Packages that are not installed are
skipped; of verl, which wants a cluster's packages, the rule by which it finds an optimizer is
written here.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ecosystem import Net, assert_trained, data, timm_installed, weights
from torch.utils.data import DataLoader

import layerlr
from layerlr import integrations
from layerlr.rules import Lamb

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
PAGE = ROOT / "docs/loops.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not the source tree")

CLIPPED = Lamb(clip=10.0)


def configuration(title):
    """A configuration of the page, by its first line."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (text,) = re.findall(
        rf"^```yaml\n# {re.escape(title)}[^\n]*\n(.*?)^```$", PAGE.read_text(), re.M | re.S
    )
    return yaml.safe_load(text)


def block(title):
    """A block of Python of the page, by its first line."""
    (text,) = re.findall(
        rf"^```python\n(# {re.escape(title)}.*?)^```$", PAGE.read_text(), re.M | re.S
    )
    return text


def trained(opt, model):
    """A step moves the model; the state dict is plain enough to be read back."""
    model(*data()[:])["loss"].backward()
    opt.step()
    assert_trained(weights(model))
    again = type(opt)(model.parameters())
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["rule"] == opt.param_groups[0]["rule"]


# -- hydra -----------------------------------------------------------------------------------------


def test_hydra():
    hydra = pytest.importorskip("hydra", reason="hydra is not installed")
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    node = omegaconf.OmegaConf.create(configuration("hydra"))
    for late in (False, True):
        model = Net()
        if late:
            node.optimizer._partial_ = True
            opt = hydra.utils.instantiate(node.optimizer)(model.named_parameters())
        else:
            opt = hydra.utils.instantiate(node.optimizer, params=model.parameters())
        assert type(opt) is layerlr.AdamW and opt.param_groups[0]["rule"] == CLIPPED
        assert opt.param_groups[0]["betas"] == (0.9, 0.95)
        trained(opt, model)


def test_a_rule_of_hydra():
    hydra = pytest.importorskip("hydra", reason="hydra is not installed")
    node = {"_target_": "layerlr.SGD", "lr": 0.1, "rule": {"_target_": "layerlr.rules.Layca"}}
    opt = hydra.utils.instantiate(node, params=Net().parameters())
    assert opt.param_groups[0]["rule"] == layerlr.rules.Layca()


def test_a_mapping_without_a_name_is_refused():
    given = {"class_path": "layerlr.rules.Lamb", "init_args": {"clip": 10.0}}
    with pytest.raises(ValueError, match=r"needs its name, \{'name': 'lamb', \.\.\.\}, got"):
        layerlr.AdamW(Net().parameters(), rule=given)
    with pytest.raises(ValueError, match="unknown rule 'lasr'"):
        layerlr.AdamW(Net().parameters(), rule={"name": "lasr"})


# -- Lightning's CLI -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["lamb", {"name": "lamb", "clip": 10.0}])
def test_lightning_cli(tmp_path, rule):
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    why = "lightning is not installed"
    cli = pytest.importorskip("lightning.pytorch.cli", reason=why, exc_type=ImportError)
    lightning = pytest.importorskip("lightning.pytorch", reason=why, exc_type=ImportError)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(*batch)["loss"]

        def train_dataloader(self):
            return DataLoader(data(), batch_size=8)

    chosen = configuration("Lightning's CLI")
    assert chosen["optimizer"]["init_args"]["rule"] == {"name": "lamb", "clip": 10.0}
    chosen["optimizer"]["init_args"]["rule"] = rule
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "logger"), False)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": trainer, **chosen}))
    run = cli.LightningCLI(Module, save_config_callback=None, args=["fit", "-c", str(file)])
    (opt,) = run.trainer.optimizers
    assert type(opt) is layerlr.AdamW
    assert opt.param_groups[0]["rule"] == (Lamb() if rule == "lamb" else CLIPPED)
    assert opt.param_groups[0]["lr"] == pytest.approx(2**-6 * 0.9)  # its schedule went on
    assert_trained(weights(run.model.net))


# -- NeMo Automodel, verl --------------------------------------------------------------------------


def nemo_like(section, model):
    """As Automodel: the longest importable part of the path, then attributes; params by keyword."""
    arguments = dict(section)
    parts = arguments.pop("_target_").split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found(params=[p for p in model.parameters() if p.requires_grad], **arguments)
    raise ImportError(parts)


def test_nemo_automodel_rule():
    model = Net()
    opt = nemo_like(configuration("NeMo Automodel")["optimizer"], model)
    assert type(opt) is layerlr.AdamW and opt.param_groups[0]["rule"] == CLIPPED
    trained(opt, model)


@pytest.mark.filterwarnings("ignore")
def test_nemo_automodel():
    why = "NeMo Automodel is not installed"
    config, recipes = "nemo_automodel.components.config", "nemo_automodel.recipes"
    loader = pytest.importorskip(f"{config}.loader", reason=why, exc_type=ImportError)
    typed = pytest.importorskip(f"{recipes}._typed_config", reason=why, exc_type=ImportError)
    name = "nemo_automodel.components.optim.optimizer"
    optim = pytest.importorskip(name, reason=why, exc_type=ImportError)
    node = loader.ConfigNode(configuration("NeMo Automodel")).optimizer
    model = Net()
    (opt,) = optim.build_optimizer_config(*typed._callable_and_kwargs(node)).build(model)
    assert type(opt) is layerlr.AdamW and opt.param_groups[0]["rule"] == CLIPPED
    trained(opt, model)


def verl_like(section, params):
    """As verl's FSDP workers: a module's path, a class's name in it, the rest by keyword."""
    arguments = {"lr": section["lr"], "weight_decay": section["weight_decay"]}
    if "adam" in section["optimizer"].lower():
        arguments["betas"] = section.get("betas", (0.9, 0.999))
    arguments |= section.get("override_optimizer_config") or {}
    return getattr(importlib.import_module(section["optimizer_impl"]), section["optimizer"])(
        params, **arguments
    )


@pytest.mark.parametrize("cls", ["AdamW", "SGD"])
def test_verl_rule(cls):
    section = configuration("verl")["actor_rollout_ref"]["actor"]["optim"]
    section["optimizer"] = cls
    model = Net()
    opt = verl_like(section, model.parameters())
    assert type(opt) is getattr(layerlr, cls) and opt.param_groups[0]["rule"] == CLIPPED
    trained(opt, model)


# -- Hugging Face ----------------------------------------------------------------------------------


def test_hugging_face_learning_rate_does_not_reach_the_class(tmp_path):
    """As docs/loops.md says: lr belongs into the keyword arguments."""
    why = "transformers or accelerate is not installed"
    transformers = pytest.importorskip("transformers", reason=why, exc_type=ImportError)
    pytest.importorskip("accelerate", reason=why, exc_type=ImportError)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=0.5, report_to="none"
    )
    for given, lr in (({}, 1e-3), ({"lr": 2**-6}, 2**-6)):
        kind = (layerlr.AdamW, {"rule": "lamb", **given})
        trainer = transformers.Trainer(Net(), arguments, optimizer_cls_and_kwargs=kind)
        assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {lr}


# -- timm ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    with timm_installed() as found:
        yield found


def test_timm_register(timm, caplog):
    names = integrations.timm.register()
    assert integrations.timm.register() == names and not caplog.records  # once is enough
    assert {"layerlr-sgd", "layerlr-adamw", "layerlr-lion"} < set(timm.optim.list_optimizers())
    for name, cls in zip(names, layerlr.optimizers.__all__, strict=True):
        model = Net()
        opt = timm.optim.create_optimizer_v2(
            model, name, lr=0.01, weight_decay=0.1, momentum=0.8, eps=1e-6, rule="lamb"
        )
        assert type(opt) is getattr(layerlr, cls)
        assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
        for key, value in (("momentum", 0.8), ("eps", 1e-6)):
            assert opt.param_groups[0].get(key, value) == value
        model(*data()[:])["loss"].backward()
        opt.step()
        assert_trained(weights(model))


def test_timm_as_docs_have_it(timm):
    names = {"layerlr": layerlr, "model": Net(), "timm": timm}
    exec(block("timm"), names)
    assert type(names["opt"]) is layerlr.AdamW and names["opt"].param_groups[0]["rule"] == Lamb()


def test_timm_elsewhere(timm, monkeypatch):
    monkeypatch.delattr(timm.registry, "default_registry")
    with pytest.raises(ImportError, match="keeps its registry of optimizers elsewhere"):
        integrations.timm.register()


def test_timm_missing(monkeypatch):
    for name in [key for key in sys.modules if key.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:2])  # built in and frozen modules alone
    with pytest.raises(ImportError, match="needs timm: pip install timm"):
        integrations.timm.register()


def test_a_script_of_timm_as_it_is(tmp_path):
    """Its arguments are its own, its folder is on the path, the names are known."""
    package = tmp_path / "timm/optim"
    package.mkdir(parents=True)
    (tmp_path / "timm/__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "_optim_factory.py").write_text(
        "from types import SimpleNamespace\n"
        "known = {}\n"
        "def OptimInfo(name, opt_class, **more): return SimpleNamespace(name=name)\n"
        "default_registry = SimpleNamespace(\n"
        "    list_optimizers=lambda: [], register=lambda info: known.setdefault(info.name))\n"
    )
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "beside.py").touch()
    (scripts / "train.py").write_text(
        "import sys, beside\nfrom timm.optim._optim_factory import known\n"
        "assert __name__ == '__main__'\nprint(sys.argv[1:], *known)\n"
    )
    command = [sys.executable, "-m", "layerlr.integrations"]
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}"}

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    done = run("scripts/train.py", "--opt", "layerlr-adamw")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['--opt', 'layerlr-adamw'] layerlr-sgd ")
    assert "usage" in run().stderr


def test_nothing_is_imported_until_it_is_asked_for():
    code = "import sys, layerlr; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# -- torchtitan ------------------------------------------------------------------------------------


def test_torchtitan_as_docs_have_it():
    name, why = "torchtitan.components.optimizer", "torchtitan is not installed"
    module = pytest.importorskip(name, reason=why, exc_type=ImportError)
    names: dict[str, object] = {}
    exec(block("torchtitan"), names)
    config, container = names["config"], names["LayerwiseOptimizers"]
    model = Net()
    opt = container(config, model_parts=[model.body, model.head])
    assert isinstance(opt, module.OptimizersContainer)
    assert all(type(o) is layerlr.AdamW for o in opt.optimizers) and len(opt.optimizers) == 2
    rules = {g["rule"] for o in opt.optimizers for g in o.param_groups}
    assert rules == {Lamb()}
    model(*data()[:])["loss"].backward()
    opt.step()
    assert_trained(weights(model))


def test_every_configuration_of_the_page_is_tried():
    titles = re.findall(r"^```yaml\n# (.+)$", PAGE.read_text(), re.M)
    assert [title.split(",")[0].split(":")[0] for title in titles] == [
        "hydra",
        "Lightning's CLI",
        "NeMo Automodel",
        "verl",
    ]
