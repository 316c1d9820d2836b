"""Telemetry: statistics on their way out of a run, without a wait in the step."""

import pickle

import pytest
import torch
from telemetry_runs import KEYS, Kept, lines, optimizer, train
from torch import nn
from waits import nobody_waits

import layerlr
from layerlr.monitor import StatsLog, Telemetry

# -- what is recorded ----------------------------------------------------------------------------


def test_a_torch_for_gpus_where_there_is_none(monkeypatch):
    """Such a torch raises when it is asked whether the current stream is captured."""

    def no_driver():
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
    kept, opt = Kept(), optimizer()
    with Telemetry(opt, kept, every=1):
        train(opt, 2)
    assert kept.steps == [1, 2]


def test_every_kth_step_as_layer_stats_has_it():
    opt, kept, wanted = optimizer(), Kept(), []
    with Telemetry(opt, kept, every=3) as telemetry:
        for step in range(1, 9):
            train(opt, 1, start=step)
            wanted += [(step, opt.layer_stats())] if step % 3 == 0 else []
    assert kept.steps == [3, 6] and telemetry.step == 8
    for (_, table), (_, stats) in zip(kept, wanted, strict=True):
        assert list(table) == ["names", *KEYS]
        assert table["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
        for key in KEYS:
            assert table[key].dtype == stats[key].dtype
            assert torch.equal(table[key], stats[key])
    assert kept[0][1]["ww"].all() and not torch.equal(kept[0][1]["gg"], kept[1][1]["gg"])


def test_a_record_is_a_snapshot_and_the_optimizer_steps_as_without():
    watched, alone, kept = optimizer(), optimizer(), Kept()
    with Telemetry(watched, kept, every=1):
        train(watched, 1)
        first = {key: kept[0][1][key].clone() for key in KEYS}
        train(watched, 3, start=1)
    train(alone, 4)
    assert all(torch.equal(kept[0][1][key], first[key]) for key in KEYS)
    for p, q in zip(watched.param_groups[0]["params"], alone.param_groups[0]["params"]):
        assert torch.equal(p, q)


def test_the_same_numbers_as_the_log():
    opt, kept = optimizer("singh"), Kept()
    log = StatsLog(opt)
    with Telemetry(opt, kept, every=1):
        for step in range(3):
            train(opt, 1, start=step)
            log.record()
    for key in KEYS:
        told = torch.stack([table[key].double() for _, table in kept])
        assert torch.equal(told, log.curves(key).values)


def test_layers_come_change_names_and_go(tmp_path):
    opt, kept, path = optimizer("singh"), Kept(), tmp_path / "layers.jsonl"
    with Telemetry(opt, kept, path, every=1):
        train(opt, 1)
        late = nn.Parameter(torch.ones(2, 2))
        opt.add_param_group({"params": [("0.weight", late)]})
        train(opt, 1)
        opt.param_groups[0]["layers"] = "module"
        train(opt, 1)
        opt.param_groups[0]["rule"] = None
        train(opt, 1)
        opt.param_groups[1]["rule"] = None
        train(opt, 1)
    first = ["0.weight", "0.bias", "1.weight", "1.bias"]
    names = [first, [*first, "0.weight#2"], ["0", "1", "0.weight"], ["0.weight"], []]
    assert [table["names"] for _, table in kept] == names
    assert [len(table["ww"]) for _, table in kept] == [4, 5, 3, 1, 0]
    assert [(row["step"], row["layer"]) for row in lines(path)] == [
        (step, name) for step, layers in enumerate(names, 1) for name in layers
    ]


def test_steps_count_on_in_the_next_run(tmp_path):
    opt, path = optimizer(), tmp_path / "layers.jsonl"
    with Telemetry(opt, path, every=2) as telemetry:
        train(opt, 5)
    state = pickle.loads(pickle.dumps(telemetry.state_dict()))
    train(opt, 1)  # after it was closed: not seen
    with Telemetry(opt, path, every=2) as telemetry:
        telemetry.load_state_dict(state)
        train(opt, 3)
    assert telemetry.step == 8
    assert [row["step"] for row in lines(path)][::4] == [2, 4, 6, 8]


def test_only_steps_that_were_taken_count():
    opt, kept = optimizer(), Kept()
    with Telemetry(opt, kept, every=1) as telemetry:
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
        assert telemetry.step == 0
        opt.step(lambda: torch.tensor(1.0))
    assert kept.steps == [1]


# -- without a wait ------------------------------------------------------------------------------


def test_nothing_is_handed_on_before_it_has_arrived(device):
    opt, kept = optimizer(), Kept()
    telemetry = Telemetry(opt, kept, every=2)
    train(opt, 3)
    assert not kept and len(device.events) == 1
    device.events[0].finish()
    assert not kept  # nothing happens behind the program's back
    train(opt, 1, start=3)
    assert kept.steps == [2] and kept[0][1]["ww"].isfinite().all()
    assert len(device.events) == 2 and device.events[0].waits == 0
    train(opt, 1, start=4)
    assert kept.steps == [2]
    telemetry.close()
    assert kept.steps == [2, 4]


def test_a_step_only_asks(device, monkeypatch):
    def wait(*args, **kwargs):
        raise AssertionError("waits for the device")

    opt, kept = optimizer(), Kept()
    telemetry = Telemetry(opt, kept, every=2)
    with monkeypatch.context() as patch:
        asking = ["__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero"]
        for name in [*asking, "numpy", "tolist"]:
            patch.setattr(torch.Tensor, name, wait)
        for module in (torch.cuda, torch.accelerator):
            patch.setattr(module, "synchronize", wait)
        for _ in range(8):
            telemetry.after_step()
    assert not kept and telemetry.skipped == 2
    assert [event.waits for event in device.events] == [0, 0]
    assert all(event.queries for event in device.events[:1])
    telemetry.close()
    assert [event.waits for event in device.events] == [1, 1]


def test_two_copies_under_way_at_most_and_what_is_left_out_is_counted(device):
    opt, kept = optimizer(), Kept()
    with Telemetry(opt, kept, every=1) as telemetry:
        train(opt, 5)
        assert len(device.events) == 2 and telemetry.skipped == 3 and not kept
        device.events[1].finish()  # the second before the first: order is kept
        train(opt, 1)
        assert not kept and telemetry.skipped == 4
        device.events[0].finish()
        train(opt, 1)
        assert kept.steps == [1, 2] and telemetry.skipped == 4
        train(opt, 1)
        assert len(device.events) == 4
    assert kept.steps == [1, 2, 7, 8]
    assert telemetry.skipped == 4


def test_flush_and_close_lose_nothing(device, tmp_path):
    opt, kept, path = optimizer(), Kept(), tmp_path / "layers.jsonl"
    telemetry = Telemetry(opt, kept, path, every=1)
    train(opt, 1)
    telemetry.flush()
    assert kept.steps == [1] and len(lines(path)) == 4
    train(opt, 2, start=1)
    telemetry.close()
    telemetry.close()
    assert kept.steps == [1, 2, 3] and len(lines(path)) == 12
    train(opt, 2)
    assert telemetry.step == 3 and not opt._optimizer_step_post_hooks


def test_names_of_a_record_are_those_of_its_step(device):
    opt, kept = optimizer("singh"), Kept()
    with Telemetry(opt, kept, every=1):
        train(opt, 1)
        opt.param_groups[0]["layers"] = "module"
        train(opt, 1)
    assert [table["names"] for _, table in kept] == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["0", "1"],
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_step_does_not_wait():
    model = nn.Linear(64, 64).cuda()
    opt, kept = layerlr.SGD(model.named_parameters(), lr=0.1, rule="layca"), Kept()
    with Telemetry(opt, kept, every=1) as telemetry:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()  # builds, warms up
        telemetry.flush()
        kept.clear()
        wanted = opt.layer_stats()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        with nobody_waits():
            telemetry.after_step()
            telemetry.after_step()
            telemetry.after_step()
        assert not kept and telemetry.skipped == 1
    assert kept.steps == [2, 3]
    for key in KEYS:
        assert not kept[0][1][key].is_cuda and not kept[0][1][key].is_pinned()
        assert torch.equal(kept[0][1][key], wanted[key].cpu())
    graph = torch.cuda.CUDAGraph()
    with Telemetry(opt, kept, every=1) as telemetry, torch.cuda.graph(graph):
        telemetry.after_step()
    assert telemetry.step == 0
