"""Generation by prefill and steps, the same loop for a model and for an export of it, with the time each part took."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from gdn_ops.cli.generate_onnx import Speed
from gdn_ops.cli.loading import Loaded
from gdn_ops.models.generation import Sampling, choose


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
