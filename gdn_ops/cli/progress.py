"""How far a run is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

LINES = 20


class Progress:
    """``with Progress(total, done) as progress: progress.update(step, loss=..., tokens_per_second=...)``."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console

        self.total, self.done, self.bar, self.task = total, done, None, None
        self.console, self.last = Console(stderr=True, highlight=False), time.monotonic()
        self.every = max(1, -(-total // LINES))
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")]
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.total, completed=self.done, figures="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(line, soft_wrap=True, markup=False)

    def update(self, step: int, **figures: Any) -> None:
        loss, speed, held_out = figures["loss"], figures["tokens_per_second"], figures.get("eval_loss")
        line = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=line)
            if held_out is not None:
                self.say(f"step {step}  {line}  held-out loss {held_out:.4f}")
            return
        quiet = time.monotonic() - self.last
        if held_out is not None or step in (self.done + 1, self.total) or step % self.every == 0 or quiet > 60:
            self.last = time.monotonic()
            shown = f"  held-out loss {held_out:.4f}" if held_out is not None else ""
            self.say(f"step {step}/{self.total}  {line}{shown}")
