"""Telemetry: statistics on their way out of a run, without a wait in the step."""

import copy
import gc
import json
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import layerlr
from layerlr.monitor import StatsLog, Telemetry, copies

KEYS = ["ww", "gg", "uu", "wu", "scale", "lr", "angle", "skipped"]


def optimizer(rule="layca", **groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return layerlr.SGD(model.named_parameters(), lr=0.1, momentum=0.9, rule=rule, **groups)


def train(opt, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def lines(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Kept(list):
    """A callback that keeps what it is given."""

    def __call__(self, step, table):
        self.append((step, table))

    @property
    def steps(self):
        return [step for step, _ in self]


class Device:
    """Stands for a device whose copies arrive when the test says so."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(copies, "to_host", self.to_host)

    def to_host(self, values):
        host = torch.full_like(values, math.nan)
        event = Event(lambda: host.copy_(values))
        self.events.append(event)
        return host, event


class Event:
    def __init__(self, arrive):
        self._arrive, self.done, self.waits, self.queries = arrive, False, 0, 0

    def finish(self):
        self._arrive()
        self.done = True

    def query(self):
        self.queries += 1
        return self.done

    def synchronize(self):
        self.waits += 1
        self.finish()


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


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
        torch.cuda.set_sync_debug_mode("error")
        try:
            telemetry.after_step()
            telemetry.after_step()
            telemetry.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not kept and telemetry.skipped == 1
    assert kept.steps == [2, 3]
    for key in KEYS:
        assert not kept[0][1][key].is_cuda and not kept[0][1][key].is_pinned()
        assert torch.equal(kept[0][1][key], wanted[key].cpu())
    graph = torch.cuda.CUDAGraph()
    with Telemetry(opt, kept, every=1) as telemetry, torch.cuda.graph(graph):
        telemetry.after_step()
    assert telemetry.step == 0


# -- where it goes -------------------------------------------------------------------------------


def test_json_lines_are_json_whatever_the_numbers(tmp_path):
    path = tmp_path / "deep" / "er" / "layers.jsonl"
    opt = optimizer("singh", on_nonfinite="propagate")
    with Telemetry(opt, str(path), every=1):
        train(opt, 1)
        opt.param_groups[0]["params"][1].grad[0] = math.nan
        opt.param_groups[0]["params"][2].grad[0] = math.inf
        opt.step()
        rows = lines(path)  # whole records are there while the file is open
    assert len(rows) == 8
    assert list(rows[0]) == ["step", "layer", *KEYS]
    assert rows[0]["step"] == 1 and rows[0]["layer"] == "0.weight"
    assert all(type(row["skipped"]) is int for row in rows)
    assert [row["gg"] is None for row in rows] == [*[False] * 5, True, True, False]
    stats = opt.layer_stats()
    for i, row in enumerate(rows[4:]):
        for key in KEYS:
            value = stats[key][i].item()
            assert row[key] == (value if math.isfinite(value) else None)


def test_an_odd_name_stays_one_line(tmp_path):
    opt = layerlr.SGD([('a\n"b\u2028', nn.Parameter(torch.ones(2)))], lr=0.1, rule="singh")
    path = tmp_path / "layers.jsonl"
    with Telemetry(opt, path, every=1):
        train(opt, 1)
    assert path.read_text().count("\n") == 1
    assert lines(path)[0]["layer"] == 'a\n"b\u2028'


def test_tensorboard_reads_the_tags_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    opt, kept = optimizer(), Kept()
    writer = SummaryWriter(tmp_path)
    with Telemetry(opt, writer, kept, every=2):
        train(opt, 4)
    found = EventAccumulator(str(tmp_path))  # flushed by close, though the writer is still open
    found.Reload()
    names = kept[0][1]["names"]
    assert set(found.Tags()["scalars"]) == {f"layer_{key}/{n}" for key in KEYS for n in names}
    for i, name in enumerate(names):
        events = found.Scalars(f"layer_angle/{name}")
        assert [event.step for event in events] == [2, 4]
        values = [table["angle"][i].item() for _, table in kept]
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)
    writer.add_scalar("mine", 1.0, 1)
    writer.close()


def test_any_object_with_add_scalar_is_a_writer():
    seen = []

    class Writer:
        def add_scalar(self, tag, value, step):
            seen.append((tag, value, step))

        def flush(self):
            seen.append("flushed")

        def __call__(self, step, table):
            raise AssertionError

    opt = optimizer()
    with Telemetry(opt, Writer(), every=1):
        train(opt, 1)
    assert seen.pop() == "flushed"
    assert seen[0][0] == "layer_ww/0.weight" and type(seen[0][1]) is float and seen[0][2] == 1
    assert len(seen) == 8 * 4


def test_what_is_refused_registers_nothing(tmp_path):
    opt = optimizer()
    for sink, kind, message in [
        (tmp_path / "layers.csv", ValueError, r"layers\.csv'.*x\.jsonl"),
        ("", ValueError, "wanted a path"),
        (3, TypeError, r"callable \(step, table\).*not a int"),
    ]:
        with pytest.raises(kind, match=message):
            Telemetry(opt, sink)
    for every in (0, -1, 2.5):
        with pytest.raises(ValueError, match="Invalid every"):
            Telemetry(opt, every=every)
    with pytest.raises(TypeError, match="of layerlr, with layer_stats, not SGD"):
        Telemetry(torch.optim.SGD([torch.ones(1, requires_grad=True)]))
    assert not opt._optimizer_step_post_hooks


def test_the_optimizer_may_be_wrapped():
    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

    opt, kept = optimizer(), Kept()
    with Telemetry(Wrapper(Wrapper(opt)), kept, every=1):
        train(opt, 1)
    assert kept.steps == [1]


# -- what goes wrong -----------------------------------------------------------------------------


class Failing:
    def __init__(self, *failing):
        self.failing, self.seen = failing, []

    def __repr__(self):
        return "Failing"

    def __call__(self, step, table):
        self.seen.append(step)
        if step in self.failing:
            raise OSError(f"no space at {step}")


def test_a_sink_that_fails_raises_from_the_step_which_is_complete(tmp_path):
    opt, plain, path = optimizer(), optimizer(), tmp_path / "layers.jsonl"
    failing, kept = Failing(2), Kept()
    with Telemetry(opt, failing, path, kept, every=1):
        train(opt, 1)
        with pytest.raises(RuntimeError, match=r"sink Failing failed at step 2$") as caught:
            train(opt, 1, start=1)
        assert isinstance(caught.value.__cause__, OSError)
        train(opt, 1, start=2)  # it is over
    assert failing.seen == kept.steps == [1, 2, 3]
    assert len(lines(path)) == 12
    train(plain, 3)
    assert torch.equal(opt.param_groups[0]["params"][0], plain.param_groups[0]["params"][0])


def test_a_sink_that_fails_late_raises_at_the_step_that_hands_on(device):
    opt, failing = optimizer(), Failing(1)
    telemetry = Telemetry(opt, failing, every=1)
    train(opt, 1)
    device.events[0].finish()
    with pytest.raises(RuntimeError, match="failed at step 1"):
        train(opt, 1, start=1)
    telemetry.close()
    assert failing.seen == [1, 2]


def test_close_does_everything_and_raises_the_first_failure(device, tmp_path):
    opt, failing, path = optimizer(), Failing(1, 2), tmp_path / "layers.jsonl"
    telemetry = Telemetry(opt, failing, path, every=1)
    train(opt, 2)
    with pytest.raises(RuntimeError, match=r"at step 1 \(the first of 2 failures\)"):
        telemetry.close()
    assert failing.seen == [1, 2] and len(lines(path)) == 8
    assert not opt._optimizer_step_post_hooks
    telemetry.close()


def test_an_exception_under_way_is_not_replaced(device):
    opt, failing = optimizer(), Failing(1)
    with pytest.warns(UserWarning, match="failed at step 1.*no space"):
        with pytest.raises(KeyboardInterrupt):
            with Telemetry(opt, failing, every=1):
                train(opt, 1)
                raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="failed at step 1"):
        with Telemetry(opt, failing, every=1):
            train(opt, 1)


def test_a_closed_file_is_said_so(tmp_path):
    opt = optimizer()
    telemetry = Telemetry(opt, tmp_path / "layers.jsonl", every=1)
    telemetry._sinks[0].close()
    with pytest.raises(RuntimeError, match=r"layers\.jsonl failed at step 1"):
        train(opt, 1)


# -- company -------------------------------------------------------------------------------------


def test_copies_and_state_dicts_of_the_optimizer_know_nothing_of_it():
    opt, kept = optimizer(), Kept()
    with Telemetry(opt, kept, every=1):
        for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            train(twin, 1)
        assert not kept
        opt.load_state_dict(opt.state_dict())
        train(opt, 1)
    assert kept.steps == [1]


def test_it_lives_as_long_as_its_optimizer(device):
    opt, kept = optimizer(), Kept()
    Telemetry(opt, kept, every=1)
    gc.collect()
    train(opt, 1)
    device.events[0].finish()
    train(opt, 1)
    assert kept.steps == [1]
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_under_torch_compile():
    opt, kept = optimizer(), Kept()
    step = torch.compile(opt.step, backend="eager")
    with Telemetry(opt, kept, every=2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(5):
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            step()
    assert kept.steps == [2, 4]
    assert kept[0][1]["ww"].all()
