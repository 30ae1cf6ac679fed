"""Runs side by side are the runs one by one; what a process or the user ends costs no other; what time cuts goes on."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gdn_ops.models import HybridLM
from perf.claims import runs, training
from perf.claims.models import SCALES, configure
from perf.claims.step import EAGER_STEPS, Step
from perf.claims.tasks import Parity
from perf.claims.training import OutOfTime, Recipe, train
from perf.claims.workers import Failed, in_turn, side_by_side, threads_each, use_gpu

TASK, RECIPE = Parity(16, (16, 32)), Recipe(12, 4, 3e-3, 1)


def toy(model: str, seed: int = 0) -> runs.Run:
    return runs.Run("parity", "toy", model, seed, TASK, RECIPE, "toy")


def taking(items):
    """What the workers take from."""
    left = list(items)
    return lambda: left.pop(0) if left else None


def deed(item: str, deadline: float, say) -> str:
    """Work for a process of its own, by name."""
    say("begun")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exits":
        os._exit(3)
    if item == "raises":
        raise ValueError("no such thing")
    if item == "late":
        raise OutOfTime
    if item == "hangs":
        time.sleep(600)
    return f"{item} by {os.getpid()}"


def test_results_do_not_depend_on_jobs(tmp_path):
    chosen, threads = [toy(name, seed) for seed in (0, 1) for name in ("gdn", "h1")], torch.get_num_threads()
    lines = []
    assert runs.run_all(chosen, tmp_path / "two", "cpu", 5, lines.append, jobs=2) == 0
    torch.set_num_threads(threads_each(2))  # as each of the two had: a sum's last bits depend on it
    try:
        assert runs.run_all(chosen, tmp_path / "one", "cpu", 5, lambda line: None) == 0
    finally:
        torch.set_num_threads(threads)
    one, two = (runs.in_order(runs.read_rows(tmp_path / name)) for name in ("one", "two"))
    same = [column for column in runs.COLUMNS if column not in ("seconds", "time")]
    order = [(row["model"], row["seed"]) for row in one]
    assert order == [("gdn", "0")] * 2 + [("gdn", "1")] * 2 + [("h1", "0")] * 2 + [("h1", "1")] * 2
    assert [[row[c] for c in same] for row in one] == [[row[c] for c in same] for row in sorted(two, key=seed_last)]
    assert any(line.startswith("[3/4] parity toy parity gdn 1: step 12/12  loss ") for line in lines)


def seed_last(row):
    return row["model"], row["seed"]


def test_one_failure_is_one_failure():
    """An exception, a signal and an exit in three processes; the fourth gives its result."""
    lines = []
    items = ["killed", "raises", "exits", "late", "good"]
    outcomes = dict(side_by_side(taking(items), deed, math.inf, lambda *line: lines.append(line), jobs=3))
    assert sorted(outcomes) == ["exits", "good", "killed", "raises"], "what ran out of time has no outcome"
    assert outcomes["killed"] == Failed("its process ended by signal SIGKILL and gave no result")
    assert outcomes["exits"] == Failed("its process ended with exit code 3 and gave no result")
    assert outcomes["raises"].reason.startswith("Traceback") and "no such thing" in outcomes["raises"].reason
    assert outcomes["good"].startswith("good by ") and str(os.getpid()) not in outcomes["good"]
    assert sorted(lines) == sorted((item, "begun") for item in items)


def place_of(item, deadline, say):
    return os.environ["PLACE"]


def remember(place):
    os.environ["PLACE"] = str(place)


def test_each_process_begins_with_its_place():
    outcomes = side_by_side(taking(range(4)), place_of, math.inf, lambda *line: None, jobs=2, begin=remember)
    places = dict(outcomes)
    assert {places[0], places[1]} == {"0", "1"} == set(places.values())


def test_processes_are_dealt_out_over_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for place in range(5):
        use_gpu(place)
    assert chosen == [0, 1, 2, 0, 1]


def test_in_turn_has_the_same_outcomes():
    outcomes = dict(in_turn(taking(["raises", "good", "late", "never"]), deed, math.inf, lambda *line: None))
    assert outcomes.keys() == {"raises", "good"} and outcomes["good"] == f"good by {os.getpid()}"
    assert outcomes["raises"].reason.startswith("Traceback")


def test_work_that_does_not_stop_is_ended():
    begun = []
    for _ in side_by_side(
        taking(["hangs"]), deed, time.monotonic() + 20, lambda *line: begun.append(line), 1, grace=-5
    ):
        pytest.fail("expected no outcome")
    assert begun == [("hangs", "begun")]
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_failures_are_told_and_tried_again(tmp_path, monkeypatch):
    trained, lines = runs.train, []

    def fails(config, *args, **kwargs):
        if config.layer_mixers[0] == "mamba2":
            raise RuntimeError("out of something")
        return trained(config, *args, **kwargs)

    monkeypatch.setattr(runs, "train", fails)
    chosen = [toy("mamba2"), toy("gdn")]
    assert runs.run_all(chosen, tmp_path, "cpu", 5, lines.append) == 1
    assert {row["model"] for row in runs.read_rows(tmp_path)} == {"gdn"}
    assert any("mamba2 0: failed: Traceback" in line and "out of something" in line for line in lines)
    assert lines[-1] == "1 runs failed, for the reasons above; the same command tries them again"
    monkeypatch.setattr(runs, "train", trained)
    assert runs.run_all(chosen, tmp_path, "cpu", 5, lines.append) == 0


def test_an_interrupt_ends_all_and_keeps_what_is_done(tmp_path):
    command = [sys.executable, "-m", "perf.claims", "recall", "--size", "toy", "--device", "cpu", "--jobs", "2"]
    root = Path(runs.__file__).parents[2]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        end = time.monotonic() + 120
        while not runs.read_rows(tmp_path) and time.monotonic() < end:
            time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
        os.killpg(parent.pid, signal.SIGINT)
        said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 130 and "interrupted; the same command goes on" in said
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    rows = runs.read_rows(tmp_path)
    assert rows and all(sum(r["model"] == row["model"] for r in rows) == 2 for row in rows), (
        "whole runs of two settings"
    )


def test_what_the_time_cuts_goes_on(tmp_path, monkeypatch):
    """Cut twice, the loss and the weights are those of a run in one go; a file of another run is not taken up."""
    config, begun = configure("gdn", SCALES["toy"], TASK.vocab_size, 32), tmp_path / "begun" / "run.pt"
    whole, loss = train(config, TASK, RECIPE, 0, "cpu", math.inf, lambda line: None)
    batch, drawn = Parity.batch, []
    monkeypatch.setattr(
        Parity, "batch", lambda self, seed, step, *args: drawn.append(step) or batch(self, seed, step, *args)
    )
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(training.time, "monotonic", itertools.count().__next__)
            with pytest.raises(OutOfTime):
                train(config, TASK, RECIPE, 0, "cpu", 9, lambda line: None, begun=begun)
    assert begun.exists() and 0 < len(drawn) < RECIPE.steps
    model, again = train(config, TASK, RECIPE, 0, "cpu", math.inf, lambda line: None, begun=begun)
    assert drawn == list(range(RECIPE.steps)) and again == loss
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))
    assert not begun.exists()

    with pytest.raises(OutOfTime):
        train(config, TASK, RECIPE, 1, "cpu", -math.inf, lambda line: None, begun=begun)
    assert train(config, TASK, RECIPE, 0, "cpu", math.inf, lambda line: None, begun=begun)[1] == loss


@pytest.mark.parametrize("name", ["transformer", "mamba2", "gdn", "h1"])
def test_a_padded_batch_has_the_same_loss_and_gradients(name):
    config, batch = configure(name, SCALES["toy"], TASK.vocab_size, 32), TASK.batch(0, 1, 4)
    length, seen = batch.ids.shape[1], []
    assert length < TASK.length
    for T in (length, TASK.length):
        torch.manual_seed(0)
        model = HybridLM(config)
        seen.append(
            (Step(model, 1e-3, 0.1, 1.0, (4, T), "cpu", True)(batch, 1e-3), [p.grad for p in model.parameters()])
        )
    (loss, gradients), (padded_loss, padded) = seen
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer", "mamba2", "deltanet", "gdn", "h1"])
def test_a_graph_trains_as_the_kernels_one_by_one_do(name):
    """Losses over steps before, at and after the capture, at a rate that changes and lengths that do."""
    config, losses = configure(name, SCALES["toy"], TASK.vocab_size, 32), []
    for graphs in (False, True):
        torch.manual_seed(0)
        step = Step(HybridLM(config).cuda().train(), 1e-3, 0.1, 1.0, (16, TASK.length), "cuda", graphs)
        losses.append([])
        with training.own_stream("cuda"):
            for i in range(EAGER_STEPS + 5):
                losses[-1].append(step(TASK.batch(0, i, 16), 1e-3 * (i + 1)).item())
        assert (step.graph is not None) == graphs
    assert len(set(losses[1])) == EAGER_STEPS + 5
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=5e-3, atol=0)
