"""The claims' tasks mean what they say, the models are of one size, and a run resumes, reports and draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from perf.claims import report, runs, training
from perf.claims.__main__ import main
from perf.claims.models import ABLATIONS, FAMILY, SCALES, configure, count, state_size
from perf.claims.tasks import IGNORED, Needle, Parity, Recall
from perf.claims.text import Text
from perf.claims.training import Diverged, OutOfTime, Reading, Recipe, read, train

TASKS = (Recall(64, 4, (2, 4), vocab_size=33), *(Needle(v, 48, (96,)) for v in (1, 2, 3)), Parity(16, (32,)))


@pytest.mark.parametrize("task", [*TASKS, Text(64, (64, 128))], ids=lambda task: task.name)
def test_a_batch_is_a_function_of_seed_and_step(task):
    one, same = task.batch(3, 5, 4), task.batch(3, 5, 4)
    assert torch.equal(one.ids, same.ids) and torch.equal(one.targets, same.targets)
    others = [task.batch(*place, 4) for place in ((3, 6), (4, 5))]
    assert not any(x.ids.shape == one.ids.shape and torch.equal(x.ids, one.ids) for x in others)
    assert one.ids.min() >= 0 and max(one.ids.max(), one.targets.max()) < task.vocab_size


@pytest.mark.parametrize("keys", [1, 4, 16])
def test_recall_asks_every_key_once_for_its_value(keys):
    batch = Recall(64, 16, (), vocab_size=65).batch(0, 0, 8, keys)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        pairs = dict(zip(ids[: 2 * keys : 2], ids[1 : 2 * keys : 2]))
        assert len(pairs) == keys and max(pairs) <= 32 < min(pairs.values())
        asked = {ids[t]: target for t, target in enumerate(targets) if target != IGNORED}
        assert asked == pairs and all(t >= 2 * keys for t, x in enumerate(targets) if x != IGNORED)
        assert sum(x != 0 for x in ids) == 3 * keys


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("length", [48, 100])
def test_the_needle_is_in_the_haystack(variant, length):
    task = Needle(variant, 48, (48, 100))
    V = {1: 2, 2: 2, 3: 8}[variant]
    batch = task.batch(0, 0, 16, length)
    assert batch.ids.shape == (16, length) and batch.answers == V
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        value = targets[-V:]
        assert targets[:-V] == [IGNORED] * (length - V)
        assert ids[-V - 1 :] == [0, ids[-V], *value[:-1]] and 17 <= ids[-V] < 17 + task.KEYS
        (place,) = [t for t in range(length - V - 1) if ids[t] == 0]
        assert ids[place : place + 2 + V] == [0, ids[-V], *value]
        rest = {x for t, x in enumerate(ids[: -V - 1]) if not place <= t < place + 2 + V}
        assert (len(rest) <= 16) == (variant == 1), "a haystack that repeats itself, or one of random words"


def test_in_training_there_are_several_needles():
    task = Needle(2, 100, ())
    batch = task.batch(0, 0, 8)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        marks = [t for t, x in enumerate(ids) if x == 0]
        assert len(marks) == 12
        hidden = {ids[t + 1]: ids[t + 2 : t + 4] for t in marks[:6]}
        asked = {ids[t + 1]: targets[t + 1 : t + 3] for t in marks[6:]}
        assert asked == hidden and len(hidden) == 6 and sum(x != IGNORED for x in targets) == 12


def test_parity_is_the_sum_so_far():
    batch = Parity(16, (32,)).batch(0, 0, 8, 32)
    for ids, targets in zip(batch.ids.numpy(), batch.targets.numpy()):
        want = np.bitwise_xor.accumulate(ids)
        assert (targets[:16] == IGNORED).all() and (targets[16:] == want[16:]).all()
    assert len({Parity(64, ()).batch(0, step, 2).ids.shape[1] for step in range(20)}) > 5


def test_text_is_the_next_byte_and_the_held_out_is_apart():
    task = Text(64, (32, 64, 256))
    batch = task.batch(0, 0, 4)
    assert batch.ids.shape == batch.targets.shape == (4, 64)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert task.batch(0, 0, 2, 256).ids.shape == (2, 256) and task.buckets() == [(0, 32), (32, 64), (64, 256)]
    from perf.claims.text import _bytes

    tokens = _bytes()
    assert len(tokens.held_out) > 1e5 and len(tokens.train) > 5 * len(tokens.held_out)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="setting: expected at most 16 keys, got 17"):
        Recall(64, 4, (), vocab_size=65).batch(0, 0, 1, 17)
    with pytest.raises(ValueError, match="setting: expected a length of at least 40, got 30"):
        Needle(3, 48, ()).batch(0, 0, 1, 30)
    with pytest.raises(ValueError, match=r"model: expected one of transformer, .*, got 'rwkv'"):
        configure("rwkv", SCALES["toy"], 64, 64)
    with pytest.raises(ValueError, match="experiment: expected one of recall"):
        runs.runs_of("nothing", "toy", 1)


@pytest.mark.parametrize("scale", ["real", "text"])
def test_models_have_the_same_parameters_and_pure_ones_the_same_state(scale):
    configurations = {name: configure(name, SCALES[scale], 257, 512) for name in (*FAMILY, *ABLATIONS)}
    counts = {name: count(x) for name, x in configurations.items()}
    assert max(counts.values()) / min(counts.values()) < 1.02, counts
    pure = {state_size(configurations[name]) for name in ("mamba2", "deltanet", "gdn")}
    assert pure == {SCALES[scale].layers * SCALES[scale].hidden_size * SCALES[scale].head}
    assert state_size(configurations["transformer"]) == 0


def test_every_run_has_a_key_of_its_own():
    for size in ("toy", "real"):
        keys = [run.key for name in runs.EXPERIMENTS for run in runs.runs_of(name, size, 2)]
        assert len(set(keys)) == len(keys)
        assert [key[-1] for key in (run.key for run in runs.runs_of("recall", size, 2))] == ["0"] * 6 + ["1"] * 6


@pytest.mark.parametrize("experiment", runs.EXPERIMENTS)
def test_real_runs_can_be_configured_and_their_batches_made(experiment):
    for run in runs.runs_of(experiment, "real", 1):
        assert run.config().max_position >= run.task.length
        if not isinstance(run.task, Text):
            for setting in run.task.settings:
                run.task.batch(0, 0, 1, setting)


def test_training_lowers_the_loss():
    """One pair a sequence: what an untrained model gives is log(33); this one has begun to find the values."""
    task, recipe = Recall(16, 1, (1,), vocab_size=9), Recipe(60, 32, 1e-2, 2)
    config = configure("gdn", SCALES["toy"], task.vocab_size, 16)
    model, loss = train(config, task, recipe, 0, "cpu", math.inf, lambda line: None)
    assert loss < 0.75 * math.log(9)
    (reading,) = read(model, task, recipe, "cpu")
    assert reading.metric == "accuracy" and reading.value > 0.25
    again = train(config, task, recipe, 0, "cpu", math.inf, lambda line: None)[1]
    assert again == loss


def test_reading_counts_whole_answers(monkeypatch):
    """A value is right if all of its tokens are."""
    task = Needle(3, 48, (48,))
    batch = task.batch(training.EVALUATION_SEED, 0, 4, 48)
    guess = batch.targets.clamp(min=0).clone()
    guess[0, -1] = (guess[0, -1] + 1) % 17  # one of eight tokens of one of four answers

    class Perfect(torch.nn.Module):
        def forward(self, ids):
            logits = torch.nn.functional.one_hot(guess, task.vocab_size).float()
            return type("Output", (), {"logits": logits})

    assert read(Perfect(), task, Recipe(1, 4, 1e-3, 1), "cpu") == [Reading(48, "accuracy", 0.75)]


def test_a_run_resumes_reports_and_draws(tmp_path, capsys, monkeypatch):
    """A budget that ends after some runs, the same command again, and once more with nothing left to do."""
    arguments = ["parity", "--size", "toy", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(runs, "_parity", lambda size: (Parity(8, (8, 16)), Recipe(3, 2, 1e-3, 1)))
    trained, calls = runs.train, itertools.count()

    def twice(*args, **kwargs):
        if next(calls) == 2:
            raise OutOfTime
        return trained(*args, **kwargs)

    monkeypatch.setattr(runs, "train", twice)
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "3 runs left: the budget of 30 minutes is over" in said.err and "step 3/3" in said.err
    first = runs.read_rows(tmp_path)
    assert [row["model"] for row in first] == ["mamba2"] * 2 + ["deltanet"] * 2
    assert main(arguments) == 0
    rows = runs.read_rows(tmp_path)
    assert rows[:4] == first and len(rows) == 10 and {row["setting"] for row in rows} == {"8", "16"}
    assert all(0 <= float(row["value"]) <= 1 and float(row["loss"]) > 0 for row in rows)
    capsys.readouterr()
    assert main(["plot", "table", *arguments]) == 0
    said = capsys.readouterr()
    assert "5 runs, 5 of them already in" in said.err and "| gdn, negative eigenvalues |" in said.out
    assert (tmp_path / "parity-toy.png").stat().st_size > 5000
    assert runs.read_rows(tmp_path) == rows


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    task, recipe = Parity(8, (8, 16)), Recipe(3, 2, math.inf, 1)
    config = configure("gdn", SCALES["toy"], task.vocab_size, 16)
    with pytest.raises(Diverged, match="the loss is nan after 3 steps"):
        train(config, task, recipe, 0, "cpu", math.inf, lambda line: None)
    run = runs.Run("parity", "toy", "gdn", 0, task, recipe, "toy")
    assert runs.run_all([run], tmp_path, "cpu", 5, lambda line: None) == 0
    rows = runs.read_rows(tmp_path)
    assert [row["value"] for row in rows] == ["nan", "nan"] and rows[0]["loss"] == "nan"
    assert "| nan | nan |" in report.table(rows)


def test_the_table_has_means_and_deviations():
    row = dict.fromkeys(runs.COLUMNS, "0") | {
        "experiment": "recall", "size": "real", "task": "recall", "model": "gdn", "metric": "accuracy", "device": "GPU",
        "parameters": "1000", "state": "50",
    }  # fmt: skip
    rows = [row | {"seed": str(s), "setting": "8", "value": v} for s, v in enumerate(("0.5", "0.7"))]
    text = report.table([*rows, rows[1] | {"value": "0.9"}])
    assert "recall, accuracy by number of keys (real; GPU)" in text
    assert "| gdn | 1,000 | 50 | 2 | 0.700 ± 0.283 |" in text
    assert report.table([]) == "no results\n"
    text = report.table([*rows, row | {"seed": "2", "setting": "8", "value": "nan", "device": "Other"}])
    assert "(real; GPU, Other)" in text and "| gdn | 1,000 | 50 | 3 | 0.600 ± 0.141 (1 diverged) |" in text


def test_tables_have_the_order_of_runs_and_a_plot_has_a_panel_a_task(tmp_path):
    """Whatever was over first, seeds that diverged and models that a task lacks so far."""
    rows = [
        dict(zip(runs.KEY, run.key)) | {
            "setting": str(setting), "metric": "x", "value": value, "parameters": "1", "state": "1", "device": "GPU",
        }
        for name in ("needle", "ablations")
        for run in runs.runs_of(name, "toy", 2)
        for setting, value in zip(run.task.settings, ("0.5", "nan" if run.seed else "inf"))
    ]  # fmt: skip
    shuffled = np.random.default_rng(0).permutation(rows[1:]).tolist()
    ordered = runs.in_order(shuffled)
    models = [list(tables) for tables in report.cells_of(ordered).values()]
    assert models[:3] == [[*runs.SUBQUADRATIC]] * 3 and models[3:] == [[*ABLATIONS]] * 2
    assert [path.name for path in report.draw(ordered, tmp_path)] == ["needle-toy.png", "ablations-toy.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_the_picture_of_perplexities_has_every_model():
    """One is worse than another by far where both are at their best, one is lost beyond its training length."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    lost, worse = {512: [3.0], 1024: [500.0]}, {512: [8.0, 8.2], 1024: [6.0, 6.4]}
    report._panel(axes, "text", {"lost": lost, "worse": worse, "diverged": {512: [math.nan]}, "none": {}})
    low, high = axes.get_ylim()
    assert low < 3.0 and 8.2 < high < 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["recall", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["recall", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["recall", "--budget", "0"], "--budget: expected more than 0 minutes, got 0"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("experiment", ["recall", "parity"])
def test_a_toy_run_on_cuda(experiment, tmp_path, capsys):
    """Compiled training under bf16 autocast, every kind of model, one after the other in one process."""
    arguments = [experiment, "--size", "toy", "--seeds", "1", "--budget", "30", "--out", str(tmp_path)]
    assert main([*arguments, "--device", "cuda"]) == 0
    models = {row["model"] for row in runs.read_rows(tmp_path)}
    assert models == {run.label or run.model for run in runs.runs_of(experiment, "toy", 1)}
    assert experiment != "recall" or models >= set(FAMILY)
