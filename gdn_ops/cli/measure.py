"""What an export is worth: one row a target with its files, their size, the error against eager, and its speed.

Speed is measured on the artifact itself with one sequence: prefill of LENGTH tokens, and decode steps. The targets take
turns, so that a machine that slows down slows all of them, and the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gdn_ops.cli.loading import Runner

LENGTH, STEPS, ROUNDS, SECONDS = 512, 32, 5, 20.0


class Row(NamedTuple):
    """``size`` in bytes; ``parity`` the largest relative RMS error of any result against eager; speeds in tokens/s."""

    target: str
    file: str
    size: int
    parity: float | None
    prefill: float
    decode: float


@torch.no_grad()
def speeds(runners: dict[str, Runner], device: torch.device, vocab_size: int) -> dict[str, tuple[float, float]]:
    """Tokens/s of prefill and of decode, by name; ROUNDS rounds, fewer if they take more than SECONDS."""
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
        name: (LENGTH / statistics.median(a for a, _ in taken), STEPS / statistics.median(b for _, b in taken))
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


def file_size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def table(rows: list[Row], title: str) -> Any:
    """The rows for ``rich`` to print."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for name in ("target", "file"):
        shown.add_column(name, overflow="fold")
    for name in ("size", "parity error", "prefill tokens/s", "decode tokens/s"):
        shown.add_column(name, justify="right")
    for row in rows:
        parity = "(reference)" if row.parity is None else f"{row.parity:.1e}"
        size = f"{row.size / 1e6:.2f} MB"
        shown.add_row(row.target, row.file, size, parity, f"{row.prefill:,.0f}", f"{row.decode:,.0f}")
    return shown
