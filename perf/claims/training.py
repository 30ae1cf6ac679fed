"""One run: a model trained on a task, then read at each of its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_ops.files import whole
from gdn_ops.models import HybridConfig, HybridLM
from perf.claims.step import Step, autocast, own_stream
from perf.claims.tasks import IGNORED, Needle, Parity, Recall
from perf.claims.text import Text, perplexity
from perf.claims.workers import OutOfTime

Task = Recall | Needle | Parity | Text
EVALUATION_SEED = 1_000_003


class Diverged(Exception):
    """The loss is no number any more: a result, too."""


@dataclass(frozen=True)
class Recipe:
    """``embedding`` is the standard deviation of the initial embeddings, None that of all weights. At the width of
    these models a token of the usual size is lost among what the first layers add to it, and what a task asks for is
    found hundreds of steps later."""

    steps: int
    batch_size: int
    lr: float
    eval_batches: int
    embedding: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What a trained model gives at one setting: the share of right answers, or the perplexity of a byte."""

    setting: int
    metric: str
    value: float


def _rate(recipe: Recipe, step: int) -> float:
    """Linear up over ``warmup`` of the steps, then a cosine to a tenth."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    config: HybridConfig, task: Task, recipe: Recipe, seed: int, device: str, deadline: float,
    report: Callable[[str], None], graphs: bool = True, begun: Path | None = None,
) -> tuple[HybridLM, float]:  # fmt: skip
    """The trained model and its last loss (the mean of the last twentieth of the steps).

    ``begun`` is a file: what is written there when the time is over, and where a later call with the same arguments
    goes on. ``graphs``: one CUDA graph a step; see :class:`~perf.claims.step.Step`.

    Raises:
        OutOfTime: ``deadline`` (seconds of ``time.monotonic``) passed.
        Diverged: the loss is no number.
    """
    torch.manual_seed(seed)
    model = HybridLM(config).to(device).train()
    if recipe.embedding is not None:
        model.embedding.weight.data.mul_(recipe.embedding / config.initializer_range)
    what = repr((config, task, recipe, seed))
    with own_stream(device):
        shape = (recipe.batch_size, task.length)
        step = Step(model, recipe.lr, recipe.weight_decay, recipe.clip, shape, device, graphs)
        first, last = _resume(step, begun, what, device)
        spoke = time.monotonic()
        for i in range(first, recipe.steps):
            if time.monotonic() > deadline:
                if begun is not None:
                    _keep(begun, {"what": what, "steps": i, "last": last, **step.state_dict()})
                raise OutOfTime
            loss = step(task.batch(seed, i, recipe.batch_size), _rate(recipe, i))
            if i >= recipe.steps - max(1, recipe.steps // 20):
                last.append(loss.clone())
            if time.monotonic() - spoke > 10 or i + 1 == recipe.steps:
                spoke = time.monotonic()
                report(f"step {i + 1}/{recipe.steps}  loss {loss.item():.4f}")
        value = torch.stack(last).mean().item()
    if begun is not None:
        begun.unlink(missing_ok=True)
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} after {recipe.steps} steps")
    return model.eval(), value


def _resume(step: Step, begun: Path | None, what: str, device: str) -> tuple[int, list[Tensor]]:
    """The first step that is to be done and the last losses so far; ``step`` as it was left, if it was begun."""
    if begun is None or not begun.exists():
        return 0, []
    state = torch.load(begun, map_location=device, weights_only=True)
    if state["what"] != what:
        return 0, []
    step.load_state_dict(state)
    return state["steps"], state["last"]


def _keep(path: Path, state: dict[str, Any]) -> None:
    """A new file in an old one's place, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        torch.save(state, temporary)


@torch.no_grad()
def read(model: HybridLM, task: Task, recipe: Recipe, device: str) -> list[Reading]:
    """The model at each of the task's settings, on batches of their own that are the same for every model."""
    if isinstance(task, Text):
        return _perplexities(model, task, recipe, device)
    readings = []
    for setting in task.settings:
        right = total = 0
        for i in range(recipe.eval_batches):
            batch = task.batch(EVALUATION_SEED, i, recipe.batch_size, setting)
            with autocast(device):
                guess = model(batch.ids.to(device)).logits.argmax(-1).cpu()
            scored = batch.targets != IGNORED
            hits = (guess == batch.targets)[scored].view(-1, batch.answers).all(1)
            right, total = right + int(hits.sum()), total + hits.numel()
        readings.append(Reading(setting, metric_of(task), right / total))
    return readings


def metric_of(task: Task) -> str:
    return "perplexity" if isinstance(task, Text) else "accuracy"


def _perplexities(model: HybridLM, task: Text, recipe: Recipe, device: str) -> list[Reading]:
    """Of the bytes between neighbouring settings, in windows of the longest; a window at a time, to bound memory."""
    longest, sums = task.settings[-1], torch.zeros(task.settings[-1], dtype=torch.float64)
    batch = task.batch(0, 0, recipe.eval_batches, longest)
    for ids, targets in zip(batch.ids, batch.targets):
        with autocast(device):
            logits = model(ids[None].to(device)).logits[0]
        sums += F.cross_entropy(logits.float(), targets.to(device), reduction="none").double().cpu()
    nats = sums / recipe.eval_batches
    return [Reading(end, metric_of(task), perplexity(nats[start:end].mean().item())) for start, end in task.buckets()]
