"""The log of a run, ``train.jsonl``: one object a step; and the loss curve drawn from it.

Fields: ``step`` (from 1), ``loss`` (nats a token), ``lr``, ``gradient_norm`` (before clipping), ``tokens`` (read so
far), ``tokens_per_second`` (of this step), ``time`` (seconds since 1970), and ``eval_loss`` where it was measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gdn_ops.cli.errors import need
from gdn_ops.files import write_file

FILE, CURVE = "train.jsonl", "loss.png"


def read(path: Path) -> list[dict[str, Any]]:
    """The log's objects in order; a line that is cut short or damaged ends it."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                entry["step"]
            except (ValueError, KeyError, TypeError):
                break
            entries.append(entry)
    return entries


class History:
    """Appends to the log; what a run had written after its last checkpoint is dropped when it is opened."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.path = folder, folder / FILE
        self.entries = [entry for entry in read(self.path) if entry["step"] <= step]
        write_file(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries).encode())
        self.file = open(self.path, "a")  # noqa: SIM115 (open as long as the run)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """A checkpoint must never be ahead of the log on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def draw(self, title: str) -> None:
        """The curve, redrawn from the log."""
        need("matplotlib", "the loss curve")
        from io import BytesIO

        from matplotlib.figure import Figure

        entries = read(self.path)
        steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
        measured = [e for e in entries if "eval_loss" in e]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")
        if measured:
            points = [e["step"] for e in measured], [e["eval_loss"] for e in measured]
            axes.plot(*points, color="tab:orange", marker="o", markersize=4, label="held-out text")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        image = BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_file(self.folder / CURVE, image.getvalue())


def _smooth(values: list[float]) -> list[float]:
    """Exponential average over about a twentieth of the run, corrected for its start."""
    keep = 1 - 1 / max(2, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
