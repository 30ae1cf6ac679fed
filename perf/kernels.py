"""What a call is made of: its kernels by torch's profiler, on the CPU its operators, each by itself.

A kernel's time here is its own, without what the host takes to start it. Kernels follow one another in warm caches, so
their sum may be less than what ``perf op`` measures of the call.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gdn_ops.models import HybridConfig
from perf import training
from perf.measure import describe, measure_ceilings
from perf.providers import Provider, bind_all
from perf.records import Recorder, environment, short
from perf.report import layout
from perf.runs import Task
from perf.shapes import DTYPES, make_inputs
from perf.training_models import TrainProvider

CALLS = 10


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """A kernel of a call of ``what`` (a shape and direction, or a preset and its size): how often it starts in one, the
    median of its times, and its share of the time of all kernels."""

    what: str
    provider: str
    kernel: str
    starts: float
    p50_us: float
    share: float


def profile(call: Callable[[], object], device: str, calls: int = CALLS) -> dict[str, list[float]]:
    """Microseconds of each kernel (on the CPU: operator, without what it calls) in ``calls`` calls after two others."""
    cuda = device == "cuda"
    call(), call()  # compiled, and in no cache for the first time
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if (event.device_type == DeviceType.CUDA) == cuda:
            time = event.device_time_total if cuda else event.self_cpu_time_total
            times.setdefault(event.name, []).append(time)
    return times


def rows_of(what: str, provider: str, times: dict[str, list[float]], calls: int = CALLS) -> list[KernelRow]:
    """The longest together first."""
    total = sum(map(sum, times.values()))
    rows = [
        KernelRow(what, provider, name, short(len(t) / calls), short(statistics.median(t)), short(sum(t) / total))
        for name, t in times.items()
    ]
    return sorted(rows, key=lambda row: -row.share)


def table(rows: Sequence[KernelRow], most: int) -> str:
    """The first ``most`` of a call, with how long they take in it."""
    lines = [["kernel", "starts", "us each", "us a call", "share"]]
    for row in rows[:most]:
        a_call = row.starts * row.p50_us
        numbers = (f"{row.starts:g}", f"{row.p50_us:.1f}", f"{a_call:.1f}", f"{row.share:.1%}")
        lines.append([row.kernel[:100], *numbers])
    return layout(lines)


def _operators(tasks: Sequence[Task], dtype: str, device: str, who: Sequence[Provider]):
    for shape, direction in tasks:
        candidates, failed = bind_all(who, [make_inputs(shape, DTYPES[dtype], device)], direction)
        for measurement in failed:
            print(f"left out: {measurement.provider}: {measurement.note}")
        for candidate in candidates:
            yield f"{shape} {direction} {dtype}", candidate.provider, candidate.calls[0]


def _steps(preset: str, size: training.Size, layers: int | None, who: Sequence[TrainProvider], device: str):
    setting = training.Setting(device, "autocast" if device == "cuda" else "fp32")
    config = HybridConfig.preset(preset, **({} if layers is None else {"num_hidden_layers": layers}))
    ids = torch.randint(config.vocab_size, (2, size.batch, size.T)).to(device)
    for provider in who:
        entry = training.enter(provider, config, ids, setting)
        if entry is not None and entry.step is not None:
            yield f"{preset} {config.num_hidden_layers} layers {size} {setting.precision}", provider.name, entry.step
        elif entry is not None:
            print(f"left out: {provider.name}: {entry.note}")


def run(
    tasks: Sequence[Task], dtype: str, who: Sequence[Provider],
    preset: str | None, size: training.Size, layers: int | None, trainers: Sequence[TrainProvider],
    device: str, csv: Path, most: int,
) -> list[KernelRow]:  # fmt: skip
    """Profiles operators, then a training step, prints a table for each, and appends the rows to ``csv``."""
    recorder = Recorder(csv, environment(device, measure_ceilings(device, DTYPES[dtype])), KernelRow)
    calls = list(_operators(tasks, dtype, device, who))
    calls += [] if preset is None else list(_steps(preset, size, layers, trainers, device))
    for what, provider, call in calls:
        try:
            rows = rows_of(what, provider, profile(call, device))
        except Exception as error:  # a peer that fails must not end the run
            print(f"left out: {provider}: {describe(error)}")
            continue
        for row in rows:
            recorder.add(row)
        print(f"\n{what}, {provider}\n{table(rows, most)}", flush=True)
    print(f"\n{len(recorder.rows)} rows in {csv}")
    return recorder.rows
