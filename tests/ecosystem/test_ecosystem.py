"""The optimizers inside other people's trainers, each skipped where it is not installed.

In each: groups as that framework builds them, its clipping, its autocast, its schedulers, and a
run that is saved and resumed in the middle, which must end with the bits of one that was not.
`test_ecosystem_loops` holds those that are a loop to be copied rather than a trainer.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from ecosystem import KINDS, Net, assert_same, assert_trained, bare, data, each_kind, weights
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import layerlr
from layerlr import rules
from layerlr.monitor import Telemetry

# -- Hugging Face Trainer ------------------------------------------------------------------------


def hugging_face(folder, kind=None, model=None, optimizers=(None, None)):
    why = "the Trainer needs transformers and accelerate"
    transformers = pytest.importorskip("transformers", reason=why, exc_type=ImportError)
    pytest.importorskip("accelerate", reason=why, exc_type=ImportError)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    return transformers.Trainer(
        model or Net(),
        arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in data()],
        optimizer_cls_and_kwargs=kind,
        optimizers=optimizers,
    )


@each_kind
def test_hugging_face_trainer(tmp_path, kind):
    cls, arguments = KINDS[kind]
    whole = hugging_face(tmp_path, (cls, dict(arguments)))
    whole.train()
    groups = whole.optimizer.optimizer.param_groups
    assert type(whole.optimizer.optimizer) is cls
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    resumed = hugging_face(tmp_path, (cls, dict(arguments)), Net(5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(whole.model), weights(resumed.model))
    ours, theirs = (t.optimizer.optimizer.layer_stats() for t in (whole, resumed))
    assert ours["ww"].all() and torch.equal(ours["gg"], theirs["gg"])


@pytest.mark.parametrize("kind", ["sgd-singh", "adamw-lamb"])
def test_hugging_face_trainer_beside_torch(tmp_path, kind):
    runs = [hugging_face(tmp_path / str(i), pair) for i, pair in enumerate(bare(kind))]
    for run in runs:
        run.train()
    for a, b in zip(*(weights(run.model) for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hugging_face_trainer_takes_the_optimizer_itself(tmp_path):
    """As ``optimizers=``: with named parameters, which its own groups lack, and any schedule."""
    model = Net()
    opt = layerlr.AdamW(model.named_parameters(), lr=0.01, rule="lamb", layers="module")
    schedule = lr_scheduler.CyclicLR(opt, 0.001, 0.02, 3)  # writes betas
    hugging_face(tmp_path, model=model, optimizers=(opt, schedule)).train()
    assert {"body.0", "head"} < set(opt.layer_stats()["names"])
    assert opt.param_groups[0]["betas"][0] != 0.9
    assert_trained(weights(model))


# -- Accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    why = "accelerate is not installed"
    accelerate = pytest.importorskip("accelerate", reason=why, exc_type=ImportError)
    from accelerate.state import AcceleratorState, GradientState

    yield accelerate
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerated(accelerate, kind, seed=0):
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
    )
    cls, arguments = KINDS[kind]
    model = Net(seed)
    opt = cls(model.named_parameters(), **arguments)
    schedule = lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8)
    loader = DataLoader(data(), batch_size=4)
    return accelerator, *accelerator.prepare(model, opt, loader, schedule)


def accelerated_epoch(accelerator, model, opt, loader, schedule):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x, y)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            schedule.step()
            opt.zero_grad()


@each_kind
def test_accelerate(accelerate, tmp_path, kind):
    run = accelerated(accelerate, kind)
    accelerated_epoch(*run)
    accelerator, model, opt, *_ = run
    assert accelerator.save_state(str(tmp_path))
    accelerated_epoch(*run)
    assert int(opt.state[next(model.parameters())]["step"]) == 8
    whole = weights(model)
    run = accelerated(accelerate, kind, seed=5)
    run[0].load_state(str(tmp_path))
    accelerated_epoch(*run)
    assert_same(whole, weights(run[1]))
    assert run[2].optimizer.param_groups[0]["adapt"] is KINDS[kind][1].get("adapt")


@each_kind
def test_accelerate_wraps_pickles_and_hands_on_state(accelerate, kind):
    accelerator, model, opt, loader, schedule = accelerated(accelerate, kind)
    accelerated_epoch(accelerator, model, opt, loader, schedule)
    state = opt.state_dict()
    assert state.keys() == {"state", "param_groups"}
    twin = pickle.loads(pickle.dumps(opt))
    assert type(twin) is type(opt) and type(twin.optimizer) is type(opt.optimizer)
    for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        q.grad = p.grad = torch.ones_like(p)
        assert opt.state[p].keys() == twin.state[q].keys()
    accelerator.gradient_state._set_sync_gradients(True)
    opt.step()
    twin.step()
    assert_same(
        [p.detach() for p in opt.param_groups[0]["params"]],
        [p.detach() for p in twin.param_groups[0]["params"]],
    )


@each_kind
def test_accelerate_sees_a_skipped_step(accelerate, kind):
    """As with float16: the scaler decides, the wrapper tells, the schedule waits."""
    accelerate.Accelerator(cpu=True)
    cls, arguments = KINDS[kind]
    model = Net()
    inner = cls(model.named_parameters(), **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    schedule = accelerate.scheduler.AcceleratedScheduler(
        lr_scheduler.StepLR(inner, 1, 0.5), [opt], split_batches=True
    )
    for bad in (False, True, False):
        before, lr = weights(model), inner.param_groups[0]["lr"]
        opt.zero_grad()
        x, y = data()[:]
        scaler.scale(model(x, y)["loss"]).backward()
        if bad:
            model.head.weight.grad[0, 0] = torch.inf
        opt.step()
        schedule.step()
        assert opt.step_was_skipped is bad
        assert all(torch.equal(p, q) is bad for p, q in zip(before, weights(model), strict=True))
        assert (inner.param_groups[0]["lr"] == lr) is bad
    assert scaler.get_scale() == 512.0
    assert int(inner.state[model.head.weight]["step"]) == 2


def test_accelerate_keeps_the_count_of_telemetry(accelerate, tmp_path):
    steps = []
    run = accelerated(accelerate, "sgd-layca")
    with Telemetry(run[2], lambda step, _: steps.append(step), every=3) as telemetry:
        run[0].register_for_checkpointing(telemetry)
        accelerated_epoch(*run)
        run[0].save_state(str(tmp_path))
    run = accelerated(accelerate, "sgd-layca")
    with Telemetry(run[2], lambda step, _: steps.append(step), every=3) as telemetry:
        run[0].register_for_checkpointing(telemetry)
        run[0].load_state(str(tmp_path))
        accelerated_epoch(*run)
    assert steps == [3, 6]  # four steps a run: two batches are accumulated


# -- Lightning -----------------------------------------------------------------------------------


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request):
    why = f"{request.param} is not installed"
    return pytest.importorskip(request.param, reason=why, exc_type=ImportError)


def module(lightning, kind, manual=False, seed=0, attach=False):
    cls, arguments = KINDS[kind] if isinstance(kind, str) else kind

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net(seed)
            self.automatic_optimization = not manual
            self.told = []

        def configure_optimizers(self):
            self.opt = cls(self.net.named_parameters(), **arguments)
            if attach:
                self.opt.attach(self.net)
            schedule = lr_scheduler.OneCycleLR(self.opt, 0.05, total_steps=16)
            schedule = {"scheduler": schedule, "interval": "step"}
            return {"optimizer": self.opt, "lr_scheduler": schedule}

        def training_step(self, batch, index):
            loss = self.net(*batch)["loss"]
            if manual:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(opt, 0.1, "norm")
                opt.step()
                self.lr_schedulers().step()
                self.told.append(opt.layer_stats())
            return loss

    return Module()


def lightning_trainer(lightning, folder, epochs, manual=False, precision="bf16-mixed"):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        gradient_clip_val=None if manual else 0.1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


LIGHTNING_WARNS = pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|ModelCheckpoint)")


@LIGHTNING_WARNS
@each_kind
@pytest.mark.parametrize("manual", [False, True])
def test_lightning(lightning, tmp_path, kind, manual):
    loader = DataLoader(data(), batch_size=4)
    whole = module(lightning, kind, manual)
    lightning_trainer(lightning, tmp_path, 2, manual).fit(whole, loader)
    assert int(whole.opt.state[whole.net.head.weight]["step"]) == 16
    half = module(lightning, kind, manual)
    trainer = lightning_trainer(lightning, tmp_path, 1, manual)
    trainer.fit(half, loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed = module(lightning, kind, manual, seed=5)
    trainer = lightning_trainer(lightning, tmp_path, 2, manual)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(whole.net), weights(resumed.net))
    if manual:  # the wrapper tells what the optimizer tells
        for told, model in ((whole.told, whole), (resumed.told, resumed)):
            last, inner = told[-1], model.opt.layer_stats()
            assert last["names"] == inner["names"]
            assert last["gg"].all() and torch.equal(last["gg"], inner["gg"])


@LIGHTNING_WARNS
@pytest.mark.parametrize("kind", ["sgd-singh", "adamw-lamb"])
def test_lightning_beside_torch(lightning, tmp_path, kind):
    models = [module(lightning, pair) for pair in bare(kind)]
    for model in models:
        trainer = lightning_trainer(lightning, tmp_path, 1)
        trainer.fit(model, DataLoader(data(), batch_size=4))
    for a, b in zip(*(weights(model.net) for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@LIGHTNING_WARNS
@pytest.mark.parametrize(
    "rule", [rules.BackMatching("probe", refresh=2), rules.Curvature("fisher")]
)
def test_lightning_with_a_rule_that_looks_at_the_model(lightning, tmp_path, rule):
    """Attached to the bare optimizer; the closure runs the module once a step, as without."""
    arguments = {"lr": 0.05, "momentum": 0.9, "rule": rule}
    model = module(lightning, (layerlr.SGD, arguments), attach=True)
    trainer = lightning_trainer(lightning, tmp_path, 1, precision="32-true")
    trainer.fit(model, DataLoader(data(), batch_size=4))
    net = Net()
    opt = layerlr.SGD(net.named_parameters(), **arguments)
    opt.attach(net)
    schedule = lr_scheduler.OneCycleLR(opt, 0.05, total_steps=16)
    for batch in DataLoader(data(), batch_size=4):
        opt.zero_grad()
        net(*batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()
        schedule.step()
    assert_same(weights(net), weights(model.net))
