"""The suite ``long``: what memory is measured and what is free in time, where it runs, and its picture."""

from __future__ import annotations

import weakref

import pytest
import torch

from perf import providers, runs
from perf.__main__ import main
from perf.linear_providers import cost as linear_cost
from perf.linear_providers import forward_and_backward as linear_both
from perf.measure import Candidate, Ceilings, Measurement, Quantiles, floor_of
from perf.plot import draw, pictures
from perf.providers import OURS, PROVIDERS, Provider, bind_all
from perf.records import Recorder, make_row
from perf.shapes import SUITES, Shape, cost, make_inputs
from tests.perf.test_records import ENVIRONMENT

CEILINGS = Ceilings(4e12, 7e14)


def test_inputs_of_one_shape_are_free_before_the_next(tmp_path, monkeypatch):
    exact, earlier = runs.make_inputs, []

    def watched(shape, *arguments):
        assert not any(tensor() is not None and T != shape.T for T, tensor in earlier)  # else a row is missing
        x = exact(shape, *arguments)
        earlier.extend((shape.T, weakref.ref(tensor)) for tensor in (x.q, x.v, x.do))
        return x

    monkeypatch.setattr(runs, "make_inputs", watched)
    monkeypatch.setattr(runs, "measure_ceilings", lambda device, dtype: CEILINGS)
    other = Provider("other", PROVIDERS[OURS].bind)
    tasks = [(Shape(1, 2, 1, T, 16, 16), d) for T, d in ((64, "forward"), (128, "forward"), (192, "backward"))]
    rows = runs.run(tasks, "fp32", "cpu", [PROVIDERS[OURS], other], tmp_path / "x.csv", budget=1.5)
    assert len(rows) == 6 and len(earlier) == 18


def test_memory_of_forward_is_everyones_and_of_backward_ours(monkeypatch, capsys):
    """In forward of the very call; in backward of both by our public function; what fails loses no other."""

    def peak_of(call):
        result = providers.first_result(call)
        return float(result.shape[-1])

    def broken():
        raise RuntimeError("no room")

    monkeypatch.setattr(providers, "peak_of", peak_of)
    x = make_inputs(Shape(1, 2, 1, 64, 16, 32), torch.float32, "cpu")
    (ours,), _ = bind_all([PROVIDERS[OURS]], [x], "forward")
    candidates = [Candidate("broken", [broken]), ours, Candidate("other", [lambda: x.q])]
    assert runs._peaks(candidates, x, "forward", runs.DELTA) == {OURS: 32.0, "other": 16.0}
    assert "peak memory: broken: RuntimeError: no room" in capsys.readouterr().err
    linear = runs.Costs(linear_cost, linear_both)
    for direction, costs in (("backward", runs.DELTA), ("forward+backward", linear)):
        assert runs._peaks(candidates, x, direction, costs) == {OURS: 16.0}  # dq
    assert runs._peaks(candidates, x, "decode", runs.DELTA) == {}


def test_gpu_takes_the_suites_in_turns_and_leaves_long_out(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs, "run", lambda tasks, *arguments: taken.extend(tasks))
    main(["gpu", "--out", str(tmp_path)])
    assert taken[:3] == [SUITES[name][0] for name in ("forward", "backward", "decode")]
    assert set(taken) == {task for name in ("forward", "backward", "decode") for task in SUITES[name]}
    assert [str(shape) for shape, d in taken if d == "decode, bf16 state"] == ["16/32 64x1", "16/32 256x1"]


def add(recorder, shape, provider, method="cuda graph", peak=None):
    """A row of a call that takes a nanosecond a token."""
    ms, least = shape.T * 1e-6, cost(shape, "forward", torch.bfloat16)
    times = Quantiles(0.9 * ms, ms, 1.1 * ms, 0.9 * ms, 50)
    measurement = Measurement(provider, times, method, "")
    recorder.add(
        make_row(shape, "forward", "bf16", measurement, least, floor_of(least, CEILINGS), CEILINGS, None, peak)
    )


@pytest.fixture
def csv(tmp_path):
    """All lengths by ours, with memory; the two shortest by another, one without; a row of another suite."""
    recorder = Recorder(tmp_path / "x.csv", ENVIRONMENT)
    add(recorder, Shape(16, 32, 1, 8192), "gdn_ops", peak=100.0)
    for shape, _ in reversed(SUITES["long"]):
        add(recorder, shape, "gdn_ops", peak=shape.T / 64)
    for (shape, _), peak in zip(SUITES["long"][:2], (50.0, None)):
        add(recorder, shape, "FLA", peak=peak)
    return recorder.path


def test_long_is_a_picture_of_its_own(csv):
    forward, long = pictures([csv])
    assert (forward.name, long.name) == ("a-device-forward-bf16.png", "a-device-long-bf16.png")
    assert list(forward.bars) == [Shape(16, 32, 1, 8192)] and long.providers == ["gdn_ops", "FLA"]
    assert {shape.T: bars["gdn_ops"].peak for shape, bars in long.bars.items()} == {
        shape.T: shape.T / 64 for shape, _ in SUITES["long"]
    }
    assert [bars["FLA"].peak for bars in long.bars.values() if "FLA" in bars] == [None, 50.0]


def test_the_same_shape_on_the_cpu_is_not_of_that_suite(tmp_path):
    recorder = Recorder(tmp_path / "cpu.csv", ENVIRONMENT)
    add(recorder, SUITES["long"][0][0], "gdn_ops", "wall clock")
    (picture,) = pictures([recorder.path])
    assert picture.direction == "forward"


def test_time_and_memory_against_the_length(csv, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, path, **more: (drawn.update({path.name: f}), save(f, path, **more))
    )
    paths = draw([csv], tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    lengths = [shape.T for shape, _ in SUITES["long"]]
    for axes, each in zip(drawn["a-device-long-bf16.png"].axes, (1e-6, 1 / 64)):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): line for line in axes.get_lines()}
        for label in ("gdn_ops", "proportional to T"):  # these times and this memory are just that
            assert list(lines[label].get_xdata()) == lengths
            assert lines[label].get_ydata() == pytest.approx([T * each for T in lengths], rel=1e-4)
        assert ("floor" in lines) == (each == 1e-6)
        assert list(lines["FLA"].get_xdata()) == lengths[: 2 if each == 1e-6 else 1]
