"""Layer rotation and the log of layer statistics: saved, drawn, written, several devices."""

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from ranks import run
from rotation_nets import Writer, distance, net, one, shake
from torch import nn
from waits import nobody_waits

import layerlr
from layerlr.monitor import LayerRotation, StatsLog

KEYS = ["ww", "gg", "uu", "wu", "scale", "lr", "angle", "skipped"]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class FakeOptimizer:
    """Writes every step into the same tensors, as an engine may."""

    def __init__(self, names):
        self.names = names
        self.table = torch.zeros(len(KEYS), len(names))

    def step(self, value):
        self.table.copy_(value + torch.arange(self.table.numel()).view_as(self.table))

    def layer_stats(self):
        return {"names": self.names} | dict(zip(KEYS, self.table, strict=True))


# -- persistence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_monitor_goes_on_where_it_was(dtype):
    model = net(3, 4, 2)
    rotation = LayerRotation(model, dtype=dtype, angles=True)
    for seed in range(2):
        shake(model, seed)
        rotation.record(10 * seed)
    state = through_file(rotation.state_dict())
    resumed = LayerRotation(model, angles=True)
    resumed.load_state_dict(state)
    shake(model, 2)
    for monitor in (rotation, resumed):
        monitor.record()
    ours, theirs = rotation.curves(), resumed.curves()
    assert ours.steps == theirs.steps == [0, 10, 11]
    assert ours.names == theirs.names
    assert torch.equal(ours.distances, theirs.distances) and ours.distances.min() > 0
    assert torch.equal(ours.angles, theirs.angles) and ours.angles.min() > 0
    assert resumed.state_dict()["start"][0].dtype == (dtype or torch.float32)


def test_loading_takes_copies_and_a_zero_start_still_waits():
    model = net(3, 4)
    nn.init.zeros_(model[0].weight)
    first = LayerRotation(model, angles=True)
    first.record()
    state = first.state_dict()
    second = LayerRotation(model, angles=True)
    second.load_state_dict(state)
    state["values"].fill_(9)
    nn.init.ones_(model[0].weight)
    second.record()
    nn.init.constant_(model[0].weight, -1.0)
    second.record()
    assert second.curves().distances.flatten().tolist() == [0, 0, pytest.approx(2)]
    assert state["start"][0].count_nonzero() == state["previous"][0].count_nonzero() == 0


@pytest.mark.parametrize(
    "sizes, kwargs, message",
    [
        ((3, 4), {}, r"only one of them has '1\.weight'"),
        ((3, 4, 2, 2), {}, r"only one of them has '2\.weight'"),
        ((3, 5, 2), {}, r"start of layer '0\.weight' has shape \(4, 3\), the parameter \(5, 3\)"),
        ((3, 4, 2), {"angles": True}, r"saved with \['distance'\]"),
    ],
)
def test_loading_something_else_is_refused_and_changes_nothing(sizes, kwargs, message):
    saved = LayerRotation(net(3, 4, 2))
    saved.record(5)
    model = net(*sizes, seed=1)
    other = LayerRotation(model, **kwargs)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    other.record()
    assert other.curves().steps == [1]
    assert other.curves().distances.count_nonzero() == 0


def test_loading_another_order_or_a_torn_table_is_refused():
    saved = LayerRotation(net(3, 3, 3))
    saved.record()
    state = saved.state_dict()
    with pytest.raises(ValueError, match="the order differs"):
        saved.load_state_dict(state | {"names": state["names"][::-1]})
    with pytest.raises(ValueError, match=r"values have shape \(1, 1, 2\), not \(2, 1, 2\)"):
        saved.load_state_dict(state | {"steps": [1, 2]})
    assert len(saved) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_watch_the_model_that_went_with_them(clone):
    model = net(3, 4)
    rotation = LayerRotation(model, angles=True)
    shake(model, 0)
    rotation.record()
    twin_model, twin = clone((model, rotation))
    shake(model, 1)
    rotation.record()
    twin.record()
    assert twin.curves().distances[0] == rotation.curves().distances[0] > 0
    assert twin.curves().angles[1] == 0 < rotation.curves().angles[1]
    with torch.no_grad():
        twin_model[0].weight.copy_(model[0].weight)
    twin.record()
    assert twin.curves().distances[2] == rotation.curves().distances[1]


# -- pictures and writers ------------------------------------------------------------------------


def test_plot_is_drawn_as_in_the_paper(tmp_path):
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    model = net(*[4] * 6)
    rotation = LayerRotation(model)
    for seed in range(3):
        shake(model, seed, 0.3)
        rotation.record()
    path = tmp_path / "rotation.png"
    axes = rotation.plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert axes.get_ylim() == (0, 1)
    colors = [to_rgba(line.get_color()) for line in axes.lines]
    assert colors == [colormaps["viridis"](i / 4) for i in range(5)]
    assert sum(colors[0][:3]) < 0.8 < 1.9 < sum(colors[-1][:3])  # dark; yellow
    for i, line in enumerate(axes.lines):
        assert line.get_label() == f"{i}.weight"
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        assert list(line.get_ydata()) == [0, *rotation.curves().distances[:, i].tolist()]


def test_plot_draws_into_axes(tmp_path):
    from matplotlib.figure import Figure

    rotation, w = one([[1.0, 0.0]], angles=True)
    axes = Figure().add_subplot()
    assert rotation.plot(axes) is axes  # before the first record: the start alone
    assert list(axes.lines[0].get_ydata()) == [0]
    distance(rotation, w, [[0, 1]])
    axes = Figure().add_subplot()
    rotation.plot(axes, "angle")
    assert list(axes.lines[0].get_ydata()) == [pytest.approx(math.pi / 2)]
    assert "radians" in axes.get_ylabel() and axes.get_ylim()[1] > 1
    assert axes.lines[0].get_marker() == "."  # a single point is seen
    with pytest.raises(ValueError, match="'lr' is not recorded; distance, angle are"):
        rotation.plot(tmp_path / "no.png", "lr")
    assert not list(tmp_path.iterdir())


def test_the_legend_is_short_and_has_both_ends(tmp_path):
    axes = LayerRotation(net(*[2] * 31)).plot(str(tmp_path / "many.png"))
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert len(names) == 12
    assert (names[0], names[-1]) == ("0.weight", "29.weight")
    assert names == sorted(set(names), key=lambda name: int(name.split(".")[0]))


def test_matplotlib_is_imported_by_plot_alone_and_pyplot_never(tmp_path):
    code = f"""
import sys, torch
from layerlr.monitor import LayerRotation
rotation = LayerRotation([("w", torch.ones(2, 2))])
rotation.record()
assert not any(m.startswith(("matplotlib", "tensorboard")) for m in sys.modules)
rotation.plot({str(tmp_path / "w.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
sys.modules["matplotlib"] = None
try:
    rotation.plot("w.png")
except ImportError as error:
    assert "pip install matplotlib" in str(error)
else:
    raise AssertionError("no matplotlib, no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "w.png").exists()


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = net(3, 4, 2)
    rotation = LayerRotation(model, angles=True)
    log = StatsLog(FakeOptimizer(["a"]))
    with SummaryWriter(str(tmp_path)) as writer:
        for seed in range(3):
            shake(model, seed)
            rotation.record(7 * seed)
            rotation.log(writer)
            log.optimizer.step(seed)
            log.record()
            log.log(writer, 100 + seed)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {"rotation/0.weight", "rotation/1.weight", "rotation_angle/0.weight"}
    tags |= {"rotation_angle/1.weight"} | {f"layer_{key}/a" for key in KEYS}
    assert set(events.Tags()["scalars"]) == tags
    curves = rotation.curves()
    for tag, values in [("rotation", curves.distances), ("rotation_angle", curves.angles)]:
        read = events.Scalars(f"{tag}/1.weight")
        assert [e.step for e in read] == [0, 7, 14]
        assert [e.value for e in read] == pytest.approx(values[:, 1].tolist(), rel=1e-6)
    read = events.Scalars("layer_lr/a")
    assert [(e.step, e.value) for e in read] == [(100, 5), (101, 6), (102, 7)]


def test_log_writes_the_last_record_read_or_not():
    writer = Writer()
    rotation, w = one([[1.0, 0.0]])
    rotation.log(writer)
    assert writer.seen == []
    w.data = torch.tensor([[0.0, 1.0]], dtype=w.dtype)
    rotation.record(4)
    rotation.log(writer)
    rotation.curves()
    rotation.log(writer, 9)
    assert writer.seen == [("rotation/w", 1.0, 4), ("rotation/w", 1.0, 9)]


# -- what the rules did --------------------------------------------------------------------------


def test_stats_are_copied_at_the_record():
    log = StatsLog(FakeOptimizer(["a", "b"]))
    for value in (0, 100):
        log.optimizer.step(value)
        log.record(step=value)
    curves = log.curves("uu")
    assert curves.names == ["a", "b"] and curves.steps == [0, 100]
    assert curves.values.tolist() == [[4, 5], [104, 105]]
    assert log.curves().values.tolist() == [[10, 11], [110, 111]]
    with pytest.raises(ValueError, match="'rate' is not recorded; ww, gg"):
        log.curves("rate")


def test_layers_that_come_later_get_columns_of_their_own():
    optimizer = FakeOptimizer(["a", "b"])
    log = StatsLog(optimizer)
    log.record()
    log.optimizer = FakeOptimizer(["new", "b", "a", "a"])
    log.optimizer.step(1)
    for _ in range(2):
        log.record()
    names, steps, values = log.curves("ww")
    assert names == ["a", "b", "new", "a#2"] and steps == [1, 2, 3]
    assert values[:, :2].tolist() == [[0, 0], [3, 2], [3, 2]]
    assert values[0, 2:].isnan().all()
    assert values[1:, 2:].tolist() == [[1, 4], [1, 4]]


@pytest.mark.parametrize("key", KEYS)
def test_stats_are_plotted_on_the_scale_that_suits_them(tmp_path, key):
    log = StatsLog(FakeOptimizer(["a", "b", "c"]))
    for value in (0, 1):
        log.optimizer.step(value)
        log.record()
    axes = log.plot(tmp_path / "stats.png", key)
    assert (tmp_path / "stats.png").read_bytes()[:4] == b"\x89PNG"
    linear = key in ("wu", "angle", "skipped")
    assert axes.get_yscale() == ("linear" if linear else "log")
    assert list(axes.lines[2].get_ydata()) == log.curves(key).values[:, 2].tolist()
    assert list(axes.lines[2].get_xdata()) == [1, 2]


def test_a_logarithm_of_nothing_positive_is_not_tried(tmp_path, recwarn):
    log = StatsLog(FakeOptimizer(["a"]))
    log.record()
    assert log.plot(tmp_path / "zero.png").get_yscale() == "linear"
    assert StatsLog(FakeOptimizer([])).plot(tmp_path / "none.png").lines[:] == []
    assert not recwarn.list


def test_a_saved_log_goes_on():
    log = StatsLog(FakeOptimizer(["a", "b"]))
    log.optimizer.step(1)
    log.record(3)
    resumed = StatsLog(log.optimizer)
    resumed.load_state_dict(through_file(log.state_dict()))
    twin = copy.deepcopy(log)
    for monitor in (resumed, twin):
        monitor.optimizer.step(2)
        monitor.record()
        assert monitor.curves().steps == [3, 4]
        assert monitor.curves().values.tolist() == [[11, 12], [12, 13]]
    assert len(log) == 1
    with pytest.raises(ValueError, match="this one records"):
        resumed.load_state_dict(one([[1.0]])[0].state_dict())


def test_a_real_optimizer_and_the_model_tell_the_same_story():
    model = net(5, 6, 3)
    optimizer = layerlr.SGD(model.named_parameters(), lr=3**-3, momentum=0.9, rule="layca")
    rotation, log = LayerRotation(model, angles=True), StatsLog(optimizer)
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        rotation.record()
        log.record()
    names, _, angles = log.curves("angle")
    kernels = [names.index(name) for name in rotation.names]
    torch.testing.assert_close(angles[:, kernels], rotation.curves().angles, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        angles[:, kernels], torch.full((3, 2), math.atan(3**-3)).double(), rtol=1e-4, atol=0
    )
    assert log.curves("ww").values.min() > 0
    assert log.curves("skipped").values.count_nonzero() == 0


# -- several devices -----------------------------------------------------------------------------


def _sharded(folder):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    starts = {"rows": torch.randn(5, 3), "one": torch.randn(1, 4), "copy": torch.randn(2, 2)}
    starts |= {"zero": torch.zeros(3, 2), "plain": torch.randn(2, 3)}
    ends = {name: start + torch.randn_like(start) for name, start in starts.items()}

    def shard(name, tensor):
        if name == "plain":
            return tensor.clone()
        return distribute_tensor(tensor, mesh, [Replicate() if name == "copy" else Shard(0)])

    sharded = {name: shard(name, t) for name, t in starts.items()}
    whole = {name: t.clone() for name, t in starts.items()}
    monitors = [LayerRotation(w.items(), adapt="all", angles=True) for w in (sharded, whole)]
    for factor in (1, -1):
        for name, end in ends.items():
            moved = shard(name, factor * end)
            local = moved.to_local() if isinstance(moved, DTensor) else moved
            here = sharded[name].to_local() if name != "plain" else sharded[name]
            here.copy_(local)
            whole[name].copy_(factor * end)
        for monitor in monitors:
            monitor.record()
    first = monitors[0].state_dict()["start"][0]
    torch.save(
        {"seen": [m.curves()[2:] for m in monitors], "rows": len(first)},
        f"{folder}/{dist.get_rank()}.pt",
    )


def test_sharded_layers_are_measured_whole(tmp_path):
    run(2, _sharded, str(tmp_path))
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [s["rows"] for s in saved] == [3, 2]  # each rank keeps the start of its own rows
    for (distances, angles), (whole_distances, whole_angles) in (s["seen"] for s in saved):
        assert whole_distances[0, :3].min() > 0.01
        assert whole_distances[:, 3].tolist() == [0, pytest.approx(2)]
        torch.testing.assert_close(distances, whole_distances, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(angles, whole_angles, rtol=1e-7, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu_the_start_is_where_it_was_asked_for_and_nothing_waits(device, dtype):
    reference = net(64, 80, 10)
    nn.init.zeros_(reference[1].weight)
    model = copy.deepcopy(reference)
    rotation = LayerRotation(model, dtype=dtype, device=device, angles=True)
    expected = LayerRotation(reference, dtype=dtype, angles=True)
    model.cuda()  # built before the move: the start follows, or stays where it was asked for
    rotation.record()
    expected.record()
    for seed in range(2):
        shake(reference, seed)
        with torch.no_grad():
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                p.copy_(q)
        expected.record()
        with nobody_waits():
            rotation.record()
    state = rotation.state_dict()
    for key in ("start", "previous"):
        assert {t.device.type for t in state[key]} == {device or "cuda"}
        assert device != "cpu" or all(t.is_pinned() for t in state[key])
    torch.testing.assert_close(
        rotation.curves().distances, expected.curves().distances, rtol=1e-10, atol=1e-15
    )
    torch.testing.assert_close(
        rotation.curves().angles, expected.curves().angles, rtol=1e-7, atol=1e-7
    )
    twin_model, twin = copy.deepcopy((model, rotation))
    shake_back = [p.clone() for p in twin_model.parameters()]
    twin.record()
    assert all(torch.equal(p, q) for p, q in zip(shake_back, model.parameters(), strict=True))
    model.cpu()
    rotation.record()
    torch.testing.assert_close(twin.curves().distances, rotation.curves().distances)
