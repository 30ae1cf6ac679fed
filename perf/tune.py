"""Tries other tiles, warps and stages of one kernel: ``python -m perf tune --kernel key_gradient``.

The launchers' ``*_configuration`` functions are the launch table; here one of them is replaced by each setting in turn,
and the whole operator is timed, because a kernel that is fast alone may leave its neighbours a colder cache. A setting
first runs in a process of its own, several at a time: that compiles it, and a setting that does not compile, does not
fit, reads out of bounds or gives other numbers than the present one never reaches the clock. What the clock finds goes
into a table and a CSV; a person then puts the winner into the function, with the figure in its docstring.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from perf import runs
from perf.clocks import Call
from perf.linear_providers import LINEAR_PROVIDERS
from perf.linear_providers import cost as linear_cost
from perf.linear_providers import forward_and_backward as linear_both
from perf.providers import OURS, PROVIDERS, Provider, difference, first_result
from perf.records import ROOT
from perf.shapes import DECODE, DTYPES, FORWARD, STATE_DTYPES, Inputs, Shape, make_inputs

Settings = dict[str, int]
LINEAR_SHAPE = Shape(1, 64, 1, 8192, 128, 64)  # Mamba2 at 1.3B
# Another order of the same sums changes the last bit of a bf16 now and then; a wrong kernel changes far more.
LARGEST_DIFFERENCE = 2e-3
SECONDS_TO_CHECK = 60.0


class Kernel(NamedTuple):
    """A configuration function, the modules (of ``gdn_ops.kernels.triton``) that call it, the direction that shows its
    kernel, and what may be chosen; ``linear``: of gated linear attention."""

    function: str
    modules: tuple[str, ...]
    direction: str
    choices: dict[str, tuple[int, ...]]
    linear: bool = False

    @property
    def ours(self) -> Provider:
        return (LINEAR_PROVIDERS if self.linear else PROVIDERS)[OURS]

    @property
    def shape(self) -> Shape:
        """What it is timed at unless told."""
        if self.direction in STATE_DTYPES:
            return DECODE[0]
        return LINEAR_SHAPE if self.linear else FORWARD[0]


_TILES = {"BK": (32, 64, 128), "BV": (16, 32, 64, 128)}
_LAUNCH = {"num_warps": (2, 4, 8), "num_stages": (2, 3)}
# A recurrent kernel holds all of K, too, and has no loop to pipeline.
_RECURRENT = {"BV": (16, 32, 64, 128), "num_warps": (1, 2, 4, 8)}
KERNELS = {
    "score": Kernel("score_configuration", ("intra_chunk",), "forward", {"BK": _TILES["BK"], **_LAUNCH}),
    # A scan holds all of K, and one stage is wrong on Hopper (docs/kernels.md): neither is a choice.
    "scan": Kernel(
        "scan_configuration", ("chunk_forward", "chunk_backward"), "forward", {"BV": (16, 32, 64, 128), **_LAUNCH}
    ),
    "value_gradient": Kernel(
        "value_gradient_configuration", ("chunk_backward",), "backward", {"BV": _TILES["BV"], **_LAUNCH}
    ),
    "key_gradient": Kernel("key_gradient_configuration", ("chunk_backward",), "backward", {**_TILES, **_LAUNCH}),
    "linear_scan": Kernel(
        "linear_scan_configuration",
        ("linear_attention", "linear_attention_backward"),
        "forward",
        {"BV": (16, 32, 64, 128), **_LAUNCH},
        linear=True,
    ),
    "score_gradient": Kernel(
        "score_gradient_configuration",
        ("linear_attention_backward",),
        "backward",
        {"BV": _TILES["BV"], **_LAUNCH},
        linear=True,
    ),
    "linear_gradient": Kernel(
        "linear_gradient_configuration",
        ("linear_attention_backward",),
        "backward",
        {"BK": (32, 64), "BV": (32, 64), "MEMBERS": (8, 16, 32), **_LAUNCH},
        linear=True,
    ),
    "recurrent_forward": Kernel("recurrent_configuration", ("recurrent",), "decode", _RECURRENT),
    "recurrent_update": Kernel("recurrent_configuration", ("recurrent",), "decode, bf16 state", _RECURRENT),
}


def settings_of(kernel: Kernel, shape: Shape) -> list[Settings]:
    """Every combination of the choices whose tiles are no wider than the heads."""
    widest = {"BK": max(16, shape.K), "BV": max(16, shape.V)}
    found = (dict(zip(kernel.choices, values)) for values in itertools.product(*kernel.choices.values()))
    return [s for s in found if all(s[name] <= widest[name] for name in widest.keys() & s.keys())]


@contextmanager
def chosen(kernel: Kernel, settings: Settings) -> Iterator[None]:
    """Inside, the kernel is launched with ``settings``, and with the usual values where they say nothing."""
    modules = [importlib.import_module(f"gdn_ops.kernels.triton.{name}") for name in kernel.modules]
    usual = [getattr(module, kernel.function) for module in modules]

    def replaced(original: Callable) -> Callable:
        return lambda *args, **kwargs: {**original(*args, **kwargs), **settings}

    try:
        for module, original in zip(modules, usual):
            setattr(module, kernel.function, replaced(original))
        yield
    finally:
        for module, original in zip(modules, usual):
            setattr(module, kernel.function, original)


def text_of(settings: Settings) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def parse_settings(text: str) -> Settings:
    """What :func:`text_of` writes."""
    return {name: int(value) for name, _, value in (part.partition("=") for part in text.split(","))}


def variant(name: str, settings: Settings) -> Provider:
    """Our operator with ``settings`` for the kernel ``name``."""

    def bind(x: Inputs, direction: str) -> Call:
        call = KERNELS[name].ours.bind(x, direction)

        def run():
            with chosen(KERNELS[name], settings):
                return call()

        return run

    return Provider(f"{name} {text_of(settings)}", bind)


def check(name: str, settings: Settings, shape: Shape, direction: str, dtype: str) -> float:
    """The difference that ``settings`` make to the result, relative RMS."""
    x = make_inputs(shape, DTYPES[dtype], "cuda")
    want = first_result(KERNELS[name].ours.bind(x, direction))
    return difference(first_result(variant(name, settings).bind(x, direction)), want)


def sound(jobs: Sequence[tuple[Settings, list[str]]], seconds: float = SECONDS_TO_CHECK) -> list[Settings]:
    """The settings whose command ends well within ``seconds``; the others are named with their last words."""
    pending, running, found = list(jobs), [], []
    end, limit = time.perf_counter() + seconds, max(1, min(15, (os.cpu_count() or 2) - 1))
    with ExitStack() as files:
        while (pending or running) and time.perf_counter() < end:
            while pending and len(running) < limit:
                settings, command = pending.pop(0)
                said = files.enter_context(tempfile.TemporaryFile())  # a pipe that is full would have the process wait
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
                running.append((settings, process, said))
            for job in [job for job in running if job[1].poll() is not None]:
                running.remove(job)
                settings, process, said = job
                said.seek(0)
                words = said.read().decode("utf-8", "replace").strip().splitlines()
                if process.returncode == 0:
                    found.append(settings)
                else:
                    print(f"left out: {text_of(settings)}: {words[-1][:160] if words else process.returncode}")
            time.sleep(0.05)
        for settings, process, _ in running:
            process.kill()
            process.wait()
            print(f"left out: {text_of(settings)}: not done after {seconds:.0f} s")
        for settings, _ in pending:
            print(f"left out: {text_of(settings)}: not begun after {seconds:.0f} s")
    return [settings for settings, _ in jobs if settings in found]


def tune(name: str, shape: Shape | None, direction: str | None, dtype: str, csv: Path, budget: float) -> None:
    """Checks every setting, then measures the sound ones next to the present one within ``budget`` seconds."""
    start, kernel = time.perf_counter(), KERNELS[name]
    shape, direction = shape or kernel.shape, direction or kernel.direction
    command = [sys.executable, "-m", "perf", "tune", "--kernel", name, "--shape", ",".join(map(str, shape))]
    command += ["--direction", direction, "--dtype", dtype, "--check"]
    jobs = [(settings, [*command, text_of(settings)]) for settings in settings_of(kernel, shape)]
    found = sound(jobs, min(SECONDS_TO_CHECK, 0.7 * budget))
    who = [kernel.ours, *(variant(name, settings) for settings in found)]
    left = max(5.0, budget - (time.perf_counter() - start))
    costs = runs.Costs(linear_cost, linear_both) if kernel.linear else None
    rows = runs.run([(shape, direction)], dtype, "cuda", who, csv, left, warm=False, costs=costs)
    for row in sorted((row for row in rows if row.p50_ms is not None), key=lambda row: row.p50_ms):
        print(f"{row.p50_ms:8.4f} ms  {'present' if row.provider == OURS else row.provider}")


def run_check(a: argparse.Namespace) -> None:
    """The process of one setting: a difference that is too large, or not a number, is its last word."""
    direction = a.direction or KERNELS[a.kernel].direction
    found = check(a.kernel, parse_settings(a.check), a.shape or KERNELS[a.kernel].shape, direction, a.dtype)
    torch.cuda.synchronize()
    if not found <= LARGEST_DIFFERENCE:
        sys.exit(f"differs by {found:.1e}")
