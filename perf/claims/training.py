"""One run: a model trained on a task, then read at each of its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_ops.models import HybridConfig, HybridLM
from perf.claims.tasks import IGNORED, Needle, Parity, Recall
from perf.claims.text import Text, perplexity

Task = Recall | Needle | Parity | Text
EVALUATION_SEED = 1_000_003


class OutOfTime(Exception):
    """The budget ended in the middle of a run, which leaves nothing."""


class Diverged(Exception):
    """The loss is no number any more: a result, too."""


@dataclass(frozen=True)
class Recipe:
    steps: int
    batch_size: int
    lr: float
    eval_batches: int
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What a trained model gives at one setting: the share of right answers, or the perplexity of a byte."""

    setting: int
    metric: str
    value: float


def _autocast(device: str):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def _rate(recipe: Recipe, step: int) -> float:
    """Linear up over ``warmup`` of the steps, then a cosine to a tenth."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    config: HybridConfig, task: Task, recipe: Recipe, seed: int, device: str, deadline: float,
    report: Callable[[str], None],
) -> tuple[HybridLM, float]:  # fmt: skip
    """The trained model and its last loss (the mean of the last twentieth of the steps).

    Raises:
        OutOfTime: ``deadline`` (seconds of ``time.monotonic``) passed.
        Diverged: the loss is no number.
    """
    torch.manual_seed(seed)
    model = HybridLM(config).to(device).train()
    groups = model.parameter_groups(recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=device == "cuda")

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        return _loss(model(ids).logits, targets)

    # Every run's function has the same code, and Dynamo keeps a few compilations of a code at most.
    torch._dynamo.reset()
    # Parity draws its lengths anew; one graph takes them all.
    run = torch.compile(loss_of, fullgraph=True, dynamic=isinstance(task, Parity)) if device == "cuda" else loss_of
    last, spoke = [], time.monotonic()
    for step in range(recipe.steps):
        if time.monotonic() > deadline:
            raise OutOfTime
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step)
        batch = task.batch(seed, step, recipe.batch_size)
        with _autocast(device):
            loss = run(batch.ids.to(device), batch.targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= recipe.steps - max(1, recipe.steps // 20):
            last.append(loss.detach())
        if time.monotonic() - spoke > 10 or step + 1 == recipe.steps:
            spoke = time.monotonic()
            report(f"step {step + 1}/{recipe.steps}  loss {loss.item():.4f}")
    value = torch.stack(last).mean().item()
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} after {recipe.steps} steps")
    return model.eval(), value


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
            with _autocast(device):
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
        with _autocast(device):
            logits = model(ids[None].to(device)).logits[0]
        sums += F.cross_entropy(logits.float(), targets.to(device), reduction="none").double().cpu()
    nats = sums / recipe.eval_batches
    return [Reading(end, metric_of(task), perplexity(nats[start:end].mean().item())) for start, end in task.buckets()]
