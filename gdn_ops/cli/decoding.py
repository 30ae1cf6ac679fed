"""Generation by prefill and steps, the same loop for a model and for an export of it, with the time each part took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gdn_ops.cli.loading import Loaded
from gdn_ops.models.generation import Sampling, choose


@dataclass
class Speed:
    """Filled in while tokens are generated; seconds include the choice of each token."""

    prompt: int = 0
    prefill_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0

    def __str__(self) -> str:
        prefill = self.prompt / max(self.prefill_seconds, 1e-9)
        text = f"prompt {self.prompt} tokens at {prefill:,.0f} tokens/s"
        if self.steps:
            text += f", {self.steps} more at {self.steps / max(self.step_seconds, 1e-9):,.0f} tokens/s"
        return text


@torch.no_grad()
def tokens(
    loaded: Loaded, prompt: list[int], limit: int, sampling: Sampling, vocabulary: int, end: int | None, speed: Speed
) -> Iterator[int]:
    """Up to ``limit`` tokens below ``vocabulary`` that continue ``prompt``; ``end`` stops it and is not among them."""
    runner, clock = loaded.runner, time.perf_counter()
    logits, state = runner.prefill(torch.tensor([prompt], device=loaded.device), runner.init_state(1))
    logits = logits[:, -1]
    for n in range(limit):
        token = choose(logits[:, :vocabulary], sampling)
        value, now = int(token), time.perf_counter()
        if n == 0:
            speed.prompt, speed.prefill_seconds = len(prompt), now - clock
        else:
            speed.steps, speed.step_seconds = n, speed.step_seconds + now - clock
        if value == end:
            return
        yield value
        clock = time.perf_counter()
        if n + 1 < limit:
            logits, state = runner.step(token, state)
