"""Which runs an experiment has, and how their results are kept: one CSV, which gets a run's rows when it is over.

Seeds come first in the order of runs, so that a budget that ends early has every model at some seeds rather than some
models at every seed.
"""

from __future__ import annotations

import csv
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gdn_ops.files import whole
from gdn_ops.models import HybridConfig
from perf.claims.models import ABLATIONS, FAMILY, SCALES, configure, count, state_size
from perf.claims.tasks import Needle, Parity, Recall
from perf.claims.text import Text
from perf.claims.training import Diverged, Reading, Recipe, Task, metric_of, read, train
from perf.claims.workers import Failed, in_turn, side_by_side, use_gpu
from perf.records import cpu_name

FILE = "results.csv"
BEGUN = "begun"
COLUMNS = (
    "experiment", "size", "task", "model", "seed", "setting", "metric", "value", "parameters", "state", "loss", "steps",
    "seconds", "device", "torch", "time",
)  # fmt: skip
KEY = ("experiment", "size", "task", "model", "seed")
EMBEDDING = 0.5  # of the synthetic tasks: training.Recipe says what and why
SUBQUADRATIC = ("mamba2", "deltanet", "gdn", "h1", "h2")


@dataclass(frozen=True)
class Run:
    experiment: str
    size: str
    model: str
    seed: int
    task: Task
    recipe: Recipe
    scale: str
    changes: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.experiment, self.size, self.task.name, self.label or self.model, str(self.seed))

    def config(self) -> HybridConfig:
        longest = max(self.task.length, *self.task.settings) if not isinstance(self.task, Recall) else self.task.length
        scale, changes = SCALES[self.scale], dict(self.changes)
        if self.recipe.embedding is not None:
            changes["initializer_range"] = scale.hidden_size**-0.5
        return configure(self.model, scale, self.task.vocab_size, longest, **changes)


def _recall(size: str) -> tuple[Task, Recipe]:
    if size == "toy":
        return Recall(64, 4, (2, 4), vocab_size=33), Recipe(30, 8, 3e-3, 2)
    return Recall(1024, 256, (32, 64, 128, 256), vocab_size=1025), Recipe(6000, 32, 3e-3, 16, EMBEDDING)


def _needles(size: str) -> list[tuple[Task, Recipe]]:
    if size == "toy":
        return [(Needle(v, 48, (48, 96)), Recipe(20, 8, 3e-3, 2)) for v in (1, 2, 3)]
    return [(Needle(v, 512, (512, 1024, 2048, 4096)), Recipe(6000, 64, 2e-3, 4, EMBEDDING)) for v in (1, 2, 3)]


def _parity(size: str) -> tuple[Task, Recipe]:
    if size == "toy":
        return Parity(16, (16, 32)), Recipe(30, 16, 3e-3, 2)
    return Parity(64, (64, 128, 256)), Recipe(4000, 256, 2e-3, 4, EMBEDDING)


def _text(size: str) -> tuple[Task, Recipe]:
    if size == "toy":
        return Text(64, (64, 128)), Recipe(20, 4, 3e-3, 2)
    return Text(2048, (512, 1024, 2048, 4096, 8192, 16384)), Recipe(1500, 16, 1e-3, 16)


def runs_of(experiment: str, size: str, seeds: int) -> list[Run]:
    """The runs of ``recall``, ``needle``, ``parity``, ``text`` or ``ablations`` at ``toy`` or ``real`` size."""

    def some(models: Sequence[str], task: Task, recipe: Recipe, scale: str = size, **options: Any) -> list[Run]:
        return [Run(experiment, size, m, seed, task, recipe, scale, **options) for seed in range(seeds) for m in models]

    if experiment == "recall":
        found = some(tuple(FAMILY), *_recall(size))
    elif experiment == "needle":
        found = [run for task in _needles(size) for run in some(SUBQUADRATIC, *task)]
    elif experiment == "parity":
        task, negative = _parity(size), (("allow_neg_eigval", True),)
        found = some(("mamba2", "deltanet", "gdn"), *task)
        for name in ("deltanet", "gdn"):
            found += some((name,), *task, changes=negative, label=f"{name}, negative eigenvalues")
    elif experiment == "text":
        found = some(("transformer", *SUBQUADRATIC), *_text(size), scale="toy" if size == "toy" else "text")
    elif experiment == "ablations":
        found = some(tuple(ABLATIONS), *_recall(size))
        text, recipe = _text(size)
        found += some(tuple(ABLATIONS), text, recipe, scale="toy" if size == "toy" else "text")
    else:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    return sorted(found, key=lambda run: run.seed)


SIZES = ("toy", "real")
EXPERIMENTS = ("recall", "needle", "parity", "text", "ablations")


def read_rows(out: Path) -> list[dict[str, str]]:
    """The rows so far; none if there is no file."""
    path = out / FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def in_order(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """As :func:`runs_of` has the runs, whichever of them were over first; rows of a run stay as they are."""
    place = {
        run.key[:-1]: i
        for i, run in enumerate(run for size in SIZES for name in EXPERIMENTS for run in runs_of(name, size, 1))
    }
    return sorted(rows, key=lambda row: place.get(tuple(row[c] for c in KEY[:-1]), len(place)))


def _append(out: Path, rows: list[dict[str, Any]]) -> None:
    """A new file in the old one's place, so that a run is there whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    everything = [*read_rows(out), *rows]
    with whole(out / FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)


def rows_of(
    run: Run, deadline: float, say: Callable[[str], None], *, device: str, graphs: bool, begun: Path
) -> list[dict[str, Any]]:
    """Trains and reads: the run's rows. ``begun`` is the folder of runs that the time ended.

    Raises:
        OutOfTime: ``deadline`` passed in training.
    """
    start, config = time.monotonic(), run.config()
    file = begun / f"{re.sub(r'[^a-z0-9]+', '-', ' '.join(run.key))}.pt"
    try:
        model, loss = train(config, run.task, run.recipe, run.seed, device, deadline, say, graphs=graphs, begun=file)
    except Diverged as error:
        say(str(error))
        loss, readings = math.nan, [Reading(x, metric_of(run.task), math.nan) for x in run.task.settings]
    else:
        readings = read(model, run.task, run.recipe, device)
    say("  ".join(f"{x.metric} at {x.setting}: {x.value:.4g}" for x in readings))
    fixed = dict(zip(KEY, run.key)) | {
        "parameters": count(config), "state": state_size(config), "loss": f"{loss:.6g}",
        "steps": run.recipe.steps, "seconds": f"{time.monotonic() - start:.1f}",
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    return [fixed | {"setting": x.setting, "metric": x.metric, "value": f"{x.value:.6g}"} for x in readings]


def run_all(
    runs: Sequence[Run], out: Path, device: str, budget: float, report: Callable[[str], None], jobs: int = 1,
    graphs: bool = True,
) -> int:  # fmt: skip
    """Does the runs that ``out`` lacks, ``jobs`` at a time, within ``budget`` minutes; returns how many are left."""
    done = {tuple(row[c] for c in KEY) for row in read_rows(out)}
    missing = [run for run in runs if run.key not in done]
    names = {run.key: f"[{i}/{len(missing)}] {' '.join(run.key)}" for i, run in enumerate(missing, 1)}
    waiting, deadline = deque(missing), time.monotonic() + 60 * budget
    report(f"{len(runs)} runs, {len(runs) - len(missing)} of them already in {out / FILE}")

    def take() -> Run | None:
        return waiting.popleft() if waiting and time.monotonic() < deadline else None

    def say(run: Run, line: str) -> None:
        report(f"{names[run.key]}: {line}")

    work = partial(rows_of, device=device, graphs=graphs, begun=out / BEGUN)
    if jobs == 1:
        outcomes = in_turn(take, work, deadline, say)
    else:
        outcomes = side_by_side(take, work, deadline, say, jobs, begin=use_gpu if device == "cuda" else None)
    added = failed = 0
    with closing(outcomes):
        for run, outcome in outcomes:
            if isinstance(outcome, Failed):
                failed += 1
                say(run, f"failed: {outcome.reason}")
            else:
                added += 1
                _append(out, outcome)
    late = len(missing) - added - failed
    if late:
        report(f"{late} runs left: the budget of {budget:g} minutes is over; the same command goes on")
    if failed:
        report(f"{failed} runs failed, for the reasons above; the same command tries them again")
    return late + failed
