"""Layer rotation: the numbers, which layers, records."""

import math

import pytest
import torch
from rotation_nets import Writer, distance, net, one, shake
from torch import nn

import layerlr
from layerlr.monitor import LayerRotation, StatsLog, cosine, recorder

# -- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end, expected",
    [
        ([2.587096694546, 4.278659917903], 0.004962809790),
        ([2.849897859261, 4.108294316597], 0.000685166233),
        ([6.0, 8.0], 0.0),
        ([-4.0, 3.0], 1.0),
        ([-30.0, -40.0], 2.0),
    ],
)
def test_distance_matches_hand_computed(end, expected):
    rotation, w = one([[3.0, 4.0]])
    assert distance(rotation, w, [end]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("turn", [1e-3, 1e-6, 1e-9, 1e-12])
def test_tiny_distances_keep_their_digits(turn):
    rotation, w = one([[1.0, 0.0]], angles=True)
    d = distance(rotation, w, [[7 * math.cos(turn), 7 * math.sin(turn)]])
    assert d == pytest.approx(2 * math.sin(turn / 2) ** 2, rel=1e-3 if turn < 1e-9 else 1e-6)
    assert rotation.curves().angles.item() == pytest.approx(turn, rel=1e-3)


def test_float32_layers_are_measured_in_float64():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(300, 70))
    rotation = LayerRotation([("w", w)], adapt="all")
    start = w.detach().double()
    with torch.no_grad():
        w[3, 5] += 1e-4
    now = w.detach().double()
    rotation.record()
    # |a|^2 |b|^2 - <a, b>^2 = |a|^2 |b - (<a, b> / |a|^2) a|^2, exact enough for sin^2 = 2 d
    across = now - (now * start).sum() / start.square().sum() * start
    sine = (across.norm() / now.norm()).item()
    assert 1e-13 < sine**2 / 2 < 1e-12
    assert rotation.curves().distances.item() == pytest.approx(sine**2 / 2, rel=1e-7)


def test_pieces_of_a_large_layer_add_up(monkeypatch):
    model = net(11, 13, 5)
    whole, pieces = LayerRotation(model), LayerRotation(model)
    shake(model, 1)
    whole.record()
    monkeypatch.setattr(cosine, "_PIECE", 7)
    pieces.record()
    assert whole.curves().distances.min() > 1e-3
    torch.testing.assert_close(
        pieces.curves().distances, whole.curves().distances, rtol=1e-13, atol=0
    )


def test_angles_are_those_since_the_record_before():
    rotation, w = one([[1.0, 0.0]], angles=True)
    for turn in (0.1, 0.4, math.pi):
        w.data = torch.tensor([[math.cos(turn), math.sin(turn)]], dtype=w.dtype)
        rotation.record()
    angles = rotation.curves().angles
    torch.testing.assert_close(angles[:, 0], torch.tensor([0.1, 0.3, math.pi - 0.4]).double())
    assert one([[1.0]])[0].curves().angles is None


def test_a_half_turn_is_pi_whatever_the_rounding():
    distances = torch.tensor([2 - 1e-15, 2, 2 + 1e-15], dtype=torch.float64)
    torch.testing.assert_close(cosine.angles(distances), torch.full((3,), math.pi).double())


@pytest.mark.parametrize("lr", [0.1, 3**-3])
def test_layca_turns_by_arctan_lr(lr):
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = layerlr.SGD([w], lr=lr, rule="layca", adapt="all")
    rotation = LayerRotation([("w", w)], adapt="all", angles=True)
    w.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    rotation.record()
    expected = {0.1: 0.004962809790, 3**-3: 0.000685166233}[lr]
    assert rotation.curves().distances.item() == pytest.approx(expected, abs=1e-12)
    assert rotation.curves().angles.item() == pytest.approx(math.atan(lr), rel=1e-12)


def test_complex_layers_count_as_pairs_of_reals():
    w = nn.Parameter(torch.tensor([[1 + 0j, 0j]]))
    rotation = LayerRotation([("w", w)], adapt="all")
    w.data = torch.tensor([[1j, 0j]])
    rotation.record()
    assert rotation.curves().distances.item() == 1.0


def test_memory_format_does_not_matter():
    w = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    rotation = LayerRotation([("w", w)], adapt="all")
    w.data = w.data.contiguous()
    rotation.record()
    assert rotation.curves().distances.item() == 0.0


# -- directions that do not exist ----------------------------------------------------------------


def test_a_zero_start_is_measured_from_the_first_weights_that_are_not():
    rotation, w = one([[0.0, 0.0]])
    seen = [
        distance(rotation, w, v) for v in ([[0, 0]], [[math.nan, 1]], [[2, 0]], [[0, 5]], [[-1, 0]])
    ]
    assert seen[0] == 0 and math.isnan(seen[1])
    assert seen[2] == 0
    assert seen[3:] == pytest.approx([1, 2])


def test_zero_weights_have_turned_nowhere_and_nan_shows():
    rotation, w = one([[3.0, 4.0]], angles=True)
    assert distance(rotation, w, [[0, 0]]) == 0
    assert rotation.curves().angles.tolist() == [[0.0]]
    assert math.isnan(distance(rotation, w, [[math.nan, 1]]))
    assert math.isnan(distance(rotation, w, [[math.inf, 1]]))
    assert distance(rotation, w, [[-3, -4]]) == pytest.approx(2)  # the start is still the first one


def test_an_empty_layer_stays_at_zero():
    rotation, w = one(torch.empty(0, 3))
    assert distance(rotation, w, torch.empty(0, 3)) == 0


# -- which layers --------------------------------------------------------------------------------


def test_layers_are_kernels_in_order_shared_ones_once():
    model = net(3, 4, 3, 4)
    model[2].weight = model[0].weight
    assert LayerRotation(model).names == ["0.weight", "1.weight"]
    pairs = model.named_parameters(remove_duplicate=False)
    assert LayerRotation(pairs).names == ["0.weight", "1.weight"]
    everything = LayerRotation(model, adapt="all").names
    assert everything == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert LayerRotation(model, adapt=lambda n, p: p.shape == (4,)).names == ["0.bias", "2.bias"]


def test_blocks_of_a_parameter_can_be_watched_as_pairs():
    fused = nn.Parameter(torch.eye(4))
    rotation = LayerRotation([("q", fused[:2]), ("k", fused[2:])])
    with torch.no_grad():
        fused[2:] = fused[2:].roll(1, dims=1)
    rotation.record()
    assert rotation.curves().distances.tolist() == [[0, pytest.approx(1)]]


def test_the_start_is_kept_in_the_dtype_chosen():
    model = net(40, 50)
    plain, rounded = LayerRotation(model), LayerRotation(model, dtype=torch.bfloat16, angles=True)
    state = rounded.state_dict()
    assert plain.state_dict()["start"][0].dtype == torch.float32
    assert state["start"][0].dtype == state["previous"][0].dtype == torch.bfloat16
    plain.record()
    rounded.record()
    assert plain.curves().distances.item() == 0
    assert 1e-7 < rounded.curves().distances.item() < 3e-6


def test_construction_refuses_what_cannot_be_watched():
    model = net(2, 2)
    for kwargs, message in [
        ({"adapt": "biases"}, "'kernels', 'all' or a callable"),
        ({"adapt": lambda n, p: False}, "no layer to watch"),
        ({"dtype": torch.int32}, "floating point"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerRotation(model, **kwargs)
    with pytest.raises(TypeError, match="named_parameters"):
        LayerRotation(model.parameters())
    with pytest.raises(ValueError, match="two parameters are named 'w'"):
        LayerRotation([("w", torch.ones(2, 2)), ("w", torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"'0\.weight' is uninitialised"):
        LayerRotation(nn.Sequential(nn.LazyLinear(3)))


def test_a_replaced_parameter_is_found_and_a_lost_one_named():
    model = net(2, 2)
    rotation = LayerRotation(model)
    model[0].weight = nn.Parameter(-model[0].weight.detach())
    rotation.record()
    assert rotation.curves().distances.item() == pytest.approx(2)
    model[0].weight = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(3, 2\), its start \(2, 2\)"):
        rotation.record()
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"'0\.weight' is gone"):
        rotation.record()
    assert len(rotation) == 1


def test_a_model_cast_in_place_is_followed():
    model = net(30, 40)
    rotation = LayerRotation(model)
    model.to(torch.float64)
    rotation.record()
    assert rotation.curves().distances.item() == 0


def test_parametrised_weights_are_watched_behind_the_parametrisation():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    rotation = LayerRotation(model)
    # the other one, of shape (2, 1), holds the norms of the rows
    assert rotation.names == ["0.parametrizations.weight.original1"]
    with torch.no_grad():
        model[0].parametrizations.weight.original1.neg_()
    rotation.record()
    assert rotation.curves().distances.tolist() == [[pytest.approx(2)]]


# -- records -------------------------------------------------------------------------------------


def test_steps_count_on_from_the_last():
    rotation, _ = one([[1.0]])
    for step in (None, None, 10, torch.tensor(20), 20.5, None):
        rotation.record(step)
    steps = rotation.curves().steps
    assert steps == [1, 2, 10, 20, 20.5, 21.5]
    assert {type(step) for step in steps} == {int, float}
    assert repr(rotation) == "LayerRotation(1 layers, 6 records)"


@pytest.mark.parametrize("reads", [False, True])
def test_long_runs_fold_without_losing_order(monkeypatch, reads):
    monkeypatch.setattr(recorder, "_FOLD", 3)
    rotation, w = one([[1.0, 0.0]])
    turns = [0.1 * i for i in range(11)]
    for i, turn in enumerate(turns):
        w.data = torch.tensor([[math.cos(turn), math.sin(turn)]], dtype=w.dtype)
        rotation.record()
        if reads and i % 4 == 1:
            rotation.curves()
        assert len(rotation._rows) < 3
    expected = 1 - torch.tensor(turns, dtype=torch.float64).cos()
    torch.testing.assert_close(rotation.curves().distances[:, 0], expected)


def test_recording_asks_the_device_nothing(monkeypatch):
    model = net(3, 4, 2)
    nn.init.zeros_(model[1].weight)
    rotation = LayerRotation(model, angles=True)
    log = StatsLog(layerlr.SGD(model.named_parameters(), lr=0.1, rule="layca"))

    def ask(*args, **kwargs):
        raise AssertionError("waits for the device")

    asking = ["__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy"]
    for name in [*asking, "tolist"]:
        monkeypatch.setattr(torch.Tensor, name, ask)
    for monitor in (rotation, log):
        monitor.record()
        with pytest.raises(AssertionError, match="waits"):
            monitor.log(Writer())


def test_curves_are_copies():
    rotation, w = one([[1.0, 0.0]])
    distance(rotation, w, [[0, 1]])
    curves = rotation.curves()
    curves.distances.zero_()
    curves.names.clear()
    curves.steps.clear()
    again = rotation.curves()
    assert (again.names, again.steps, again.distances.tolist()) == (["w"], [1], [[1.0]])
