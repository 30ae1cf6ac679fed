"""What an export is worth: one row a program of a target, with its file, size, error against eager, and speed.

Speed is measured on the artifact itself with one sequence: prefill of LENGTH tokens, and decode steps. The targets take
turns, so that a machine that slows down slows all of them, and the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.cli import generate_onnx
from gdn_ops.cli.loading import Runner

LENGTH, STEPS, ROUNDS, SECONDS = 512, 32, 5, 20.0


class Row(NamedTuple):
    """``program`` is ``prefill`` or ``step``; ``size`` in bytes; ``parity`` the largest relative RMS error of any of
    its results against eager, None for eager itself; ``speed`` in tokens/s, None for what this machine cannot run."""

    target: str
    program: str
    file: str
    size: int
    parity: float | None
    speed: float | None


class OnnxRunner:
    """An exported ONNX file that answers the calls of :class:`gdn_ops.cli.loading.Runner`, on the CPU."""

    def __init__(self, model: generate_onnx.Model) -> None:
        self.model = model

    def init_state(self, batch: int) -> Any:
        return self.model.init_state(batch)

    def prefill(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.model.run(input_ids.numpy(), state)
        return torch.from_numpy(generate_onnx.array(logits)), state

    def step(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.prefill(input_ids[:, None], state)
        return logits[:, -1], state


@torch.no_grad()
def speeds(runners: dict[str, Runner], device: torch.device, vocab_size: int) -> dict[str, dict[str, float]]:
    """Tokens/s by target and program; ROUNDS rounds, fewer if they take more than SECONDS."""
    ids = torch.randint(vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    start = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for name, runner in runners.items():
            taken = _once(runner, ids)
            if turn:  # the first round warms up
                times[name].append(taken)
        if turn and time.perf_counter() - start > SECONDS:
            break
    return {
        name: {
            "prefill": LENGTH / statistics.median(prefill for prefill, _ in taken),
            "step": STEPS / statistics.median(decode for _, decode in taken),
        }
        for name, taken in times.items()
    }


def _once(runner: Runner, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of one prefill and of STEPS steps after it."""
    state = runner.init_state(1)
    prefill, (logits, state) = _timed(ids.device, lambda: runner.prefill(ids, state))
    token = logits[:, -1].argmax(-1)

    def decode() -> None:
        current = state
        for _ in range(STEPS):
            _, current = runner.step(token, current)

    return prefill, _timed(ids.device, decode)[0]


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def parities(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The largest error of each program among the cases of a parity report."""
    worst: dict[str, float] = {}
    for case in cases:
        if "error" in case:
            worst[case["program"]] = max(worst.get(case["program"], 0.0), case["error"])
    return worst


def table(rows: list[Row], title: str) -> Any:
    """The rows for ``rich`` to print."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for name in ("target", "program", "file"):
        shown.add_column(name, overflow="fold")
    for name in ("size", "parity error", "tokens/s"):
        shown.add_column(name, justify="right")
    for row in rows:
        parity = "(reference)" if row.parity is None else f"{row.parity:.1e}"
        speed = "not run" if row.speed is None else f"{row.speed:,.0f}"
        shown.add_row(row.target, row.program, row.file, f"{row.size / 1e6:.2f} MB", parity, speed)
    return shown
