"""A run over operators: warms the compilers up, measures row by row within a budget, records each row as it comes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from perf import providers
from perf.clocks import Call
from perf.measure import Candidate, Ceilings, clocks_of, describe, floor_of, input_sets, interleave, measure_ceilings
from perf.providers import Provider, bind_all
from perf.records import ROOT, Recorder, Row, environment, make_row
from perf.report import summary
from perf.shapes import DTYPES, Cost, Inputs, Shape, cost, make_inputs

Task = tuple[Shape, str]


class Costs(NamedTuple):
    """What a rule takes at the least (``perf.shapes.cost``); forward and backward by our public function, whose memory
    is measured."""

    least: Callable[[Shape, str, torch.dtype], Cost]
    both: Callable[[Inputs], Call]


DELTA = Costs(cost, providers.forward_and_backward)


def parse_task(text: str) -> Task:
    """``"16,32,1,8192,128,128:forward"``, as :func:`warm_up` hands work to its processes."""
    shape, _, direction = text.partition(":")
    return Shape(*map(int, shape.split(","))), direction


def compile_once(tasks: Sequence[Task], dtype: str, who: Sequence[Provider], part: tuple[int, int] = (0, 1)) -> None:
    """Runs each task once, so that what it compiles is in the compilers' caches on disk; of what an autotuner would
    try, ``part = (i, n)`` takes every n-th configuration."""
    for shape, direction in tasks:
        x = make_inputs(shape, DTYPES[dtype], "cuda")
        for candidate in bind_all(who, [x], direction)[0]:
            providers.share_autotuning(*part)
            try:
                candidate.calls[0]()
                torch.cuda.synchronize()
            except Exception as error:  # the measuring process will meet it again and note it in the row
                print(f"warm-up: {shape} {direction} {candidate.provider}: {describe(error)}", file=sys.stderr)


def distinct(tasks: Sequence[Task]) -> list[Task]:
    """One task, the shortest, of those that compile nearly the same kernels: a length matters by its alignment, and
    by how many segments it gives."""
    chosen: dict[tuple, Task] = {}
    for shape, direction in tasks:
        key = (*shape._replace(T=shape.T if shape.T == 1 else shape.T % 16), direction)
        if key not in chosen or shape.T < chosen[key][0].T:
            chosen[key] = (shape, direction)
    return list(chosen.values())


PARTS = 4


def warm_up_jobs(tasks: Sequence[Task], who: Sequence[Provider]) -> list[list[str]]:
    """Arguments of the processes that :func:`warm_up` starts, the most pressing first: our kernels, a process a task;
    then peers, whose autotuners try dozens of configurations, by ``PARTS`` processes a task; then the lengths that
    :func:`distinct` left out, for which little is left to compile."""
    own, peers = ([p.name for p in who if (p.library is None) == ours] for ours in (True, False))
    first = distinct(tasks)

    def job(task: Task, names: Sequence[str], i: int = 0, n: int = 1) -> list[str]:
        text = ",".join(map(str, task[0])) + ":" + task[1]
        return ["--task", text, "--part", f"{i},{n}", *(word for name in names for word in ("--provider", name))]

    jobs = [job(task, own) for task in first if own]
    jobs += [job(task, [name], i, PARTS) for task in first for name in peers for i in range(PARTS)]
    return jobs + [job(task, own) for task in tasks if own and task not in first]


def warm_up(tasks: Sequence[Task], dtype: str, who: Sequence[Provider], seconds: float) -> None:
    """:func:`compile_once` in several processes: heads are constants of the kernels, so that nearly every row
    compiles its own, and one after another would take longer than all of the measuring."""
    pending = warm_up_jobs(tasks, who)
    running: list[subprocess.Popen] = []
    end, limit = time.perf_counter() + seconds, max(1, min(15, (os.cpu_count() or 2) - 1))
    while (pending or running) and time.perf_counter() < end:
        running = [process for process in running if process.poll() is None]
        while pending and len(running) < limit:
            command = [sys.executable, "-m", "perf", "warm", "--dtype", dtype, *pending.pop(0)]
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
        time.sleep(0.05)
    for process in running:
        process.kill()
        process.wait()
    if pending or running:
        print(f"warm-up: stopped after {seconds:.0f} s; what is left compiles while it is measured", file=sys.stderr)


def measure_task(
    task: Task, dtype: str, device: str, who: Sequence[Provider], seconds: float, recorder: Recorder,
    ceilings: Ceilings, costs: Costs = DELTA,
) -> list[Row]:  # fmt: skip
    """One shape and direction for every provider; adds the rows to ``recorder`` and returns them."""
    shape, direction = task
    least = costs.least(shape, direction, DTYPES[dtype])
    floor = floor_of(least, ceilings)
    count = input_sets(device, least.bytes)
    sets = [make_inputs(shape, DTYPES[dtype], device, seed) for seed in range(count)]
    candidates, failed = bind_all(who, sets, direction)
    errors = _differences(candidates) if len(candidates) > 1 else {}
    repeats = max(1, min(16, int(1.0 / (floor.ms * count)))) if device == "cuda" else 1
    # The wall clock's preparation is a warm-up already, and a call on the CPU may take seconds.
    warm = 2 if device == "cuda" else 0
    measured = interleave(candidates, clocks_of(device), seconds, repeats, warm=warm) + failed
    peaks = _peaks(candidates, sets[0], direction, costs) if device == "cuda" else {}
    rows = [
        make_row(
            shape, direction, dtype, m, least, floor, ceilings, errors.get(m.provider), peaks.get(m.provider),
        )
        for m in measured
    ]  # fmt: skip
    for row in rows:
        recorder.add(row)
    return rows


def _peaks(candidates: Sequence[Candidate], x: Inputs, direction: str, costs: Costs) -> dict[str, float]:
    """MiB beyond the inputs: of everyone's call in ``forward``; of ours, forward and backward, where there is one."""
    wanted: dict[str, Callable[[], Call]] = {}
    if direction == "forward":
        wanted = {c.provider: lambda c=c: c.calls[0] for c in candidates}
    elif direction in ("backward", "forward+backward"):
        wanted = {providers.OURS: lambda: costs.both(x)}
    peaks = {}
    for provider, bind in wanted.items():
        try:
            peaks[provider] = providers.peak_of(bind())
        except Exception as error:  # the times are there already and must not be lost
            print(f"peak memory: {provider}: {describe(error)}", file=sys.stderr)
    return peaks


def _differences(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Of each peer's result from ours, on the first set of inputs: fast and wrong is not fast."""
    results = {}
    for candidate in candidates:
        try:
            results[candidate.provider] = providers.first_result(candidate.calls[0]).detach()
        except Exception:  # the clock meets the same error and notes it
            continue
    ours = results.pop(providers.OURS, None)
    return {} if ours is None else {name: providers.difference(x, ours) for name, x in results.items()}


def run(
    tasks: Sequence[Task], dtype: str, device: str, who: Sequence[Provider], csv: Path, budget: float,
    warm: bool = True, costs: Costs | None = None,
) -> list[Row]:  # fmt: skip
    """Measures ``tasks`` in order within ``budget`` seconds (compilation included) and prints the summary.

    Providers that are not installed are named first; tasks that the budget leaves no time for are named at the end.
    """
    start = time.perf_counter()
    missing = providers.absent(who)
    for name, reason in missing.items():
        print(f"absent: {name}: {reason}")
    who = [provider for provider in who if provider.name not in missing]
    if warm and device == "cuda":
        warm_up(tasks, dtype, who, 0.6 * budget)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    ceilings = measure_ceilings(device, DTYPES[dtype])
    env = environment(device, ceilings)
    recorder, skipped = Recorder(csv, env), []
    for i, task in enumerate(tasks):
        left = budget - (time.perf_counter() - start)
        if left <= 0:
            skipped.append(task)
            continue
        # On a GPU most of a row's share goes to making inputs and capturing graphs; two seconds are plenty of samples.
        share = left / (len(tasks) - i)
        seconds = min(2.0, share / 3) if device == "cuda" else 0.8 * share
        try:
            rows = measure_task(task, dtype, device, who, seconds, recorder, ceilings, costs or DELTA)
        except Exception as error:  # inputs that do not fit must not lose the tasks after them
            print(f"not measured: {task[0]} {task[1]}: {describe(error)}", flush=True)
            continue
        for row in rows:
            shown = "-" if row.p50_ms is None else f"{row.p50_ms:.4g} ms, {row.ratio:.2f} x floor"
            print(f"{row.shape} {row.direction} {row.provider}: {shown} {row.note}".rstrip(), flush=True)
    # Those from elsewhere are of the delta rule.
    print("\n" + summary(recorder.rows, env, providers.OURS, compare=costs is None))
    for shape, direction in skipped:
        print(f"not measured, the budget of {budget:g} s was spent: {shape} {direction}")
    print(f"\n{len(recorder.rows)} rows in {csv}, {time.perf_counter() - start:.0f} s")
    return recorder.rows
