"""Telemetry: where it goes, what goes wrong, and its company."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from telemetry_runs import KEYS, Kept, lines, optimizer, train
from torch import nn

import layerlr
from layerlr.monitor import Telemetry

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
    pytest.importorskip("tensorboard", reason="the log is read with tensorboard")
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
