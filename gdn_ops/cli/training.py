"""The training loop behind ``gdn train``: AdamW on random windows, cosine after a linear warm-up, resumable.

A run is a folder. ``train.json`` holds its recipe, which is all that the sequence of losses depends on; a later call
with another recipe is refused. The step, the optimizer and the weights come from the last checkpoint, the data from
``(seed, step)``: a run that was killed and started again gives the same losses, bit for bit, as one that was not (on
the same machine, with the same choice of ``--compile`` and ``--checkpointing``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdn_ops.cli import checkpoint
from gdn_ops.cli.corpus import Tokens
from gdn_ops.cli.errors import Failure, UserError
from gdn_ops.cli.history import History
from gdn_ops.cli.progress import Progress
from gdn_ops.cli.text import Text
from gdn_ops.files import write_file

RECIPE, FORMAT, VERSION, LOCK = "train.json", "gdn_ops.train", 1, ".lock"
BETAS, FINAL = (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Recipe:
    """What the losses of a run depend on. ``data`` is :func:`gdn_ops.cli.corpus.digest`."""

    config: dict[str, Any]
    data: str
    steps: int
    batch_size: int
    accumulate: int
    seq_len: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    dtype: str
    held_out: float


@dataclass(frozen=True)
class Session:
    """How this call goes about it."""

    device: torch.device
    compile: bool
    checkpointing: str
    save_every: int
    eval_every: int
    eval_batches: int
    stop_at: int | None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Creates the run's folder and keeps other processes from training in it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115 (the lock lasts as long as the file is open)
    except OSError as error:
        raise UserError(f"--out: expected a folder that can be written, got {folder} ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out: expected a folder that no other gdn train is using, got {folder}") from None
        yield


def enter(folder: Path, recipe: Recipe, resume: bool | None) -> Path | None:
    """Checks that ``folder`` is free or holds a run of this very recipe; returns the checkpoint to go on from."""
    path, kept, newest = folder / RECIPE, folder / checkpoint.FOLDER, checkpoint.newest(folder)
    if not path.is_file():
        for left in folder.glob(f".{RECIPE}.*"):  # of a process that was killed
            left.unlink()
        others = [name for name in (p.name for p in folder.iterdir()) if name != LOCK]
        if others:
            raise UserError(f"--out: expected a new or empty folder or an earlier run, got {folder} with {others[0]}")
    if kept.exists() and not kept.is_dir():
        raise UserError(f"--out: expected a folder of checkpoints, got the file {kept}")
    if newest is None:  # nothing has been learnt here that another recipe could contradict
        fields = {"format": FORMAT, "version": VERSION, **asdict(recipe)}
        write_file(path, json.dumps(fields, indent=2).encode() + b"\n")
        return None
    if resume is False:
        raise UserError(f"--no-resume: expected a new or empty folder, got {folder} with an earlier run")
    try:
        earlier = json.loads(path.read_text())
        known = (earlier["format"], earlier["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: expected {path} to describe a run, got {error!r}") from error
    if not known:
        raise UserError(f"--out: expected format {FORMAT} {VERSION} in {path}, got another")
    if not isinstance(earlier.get("config"), dict):
        raise UserError(f"--out: expected the fields of a model as config in {path}, got {earlier.get('config')!r}")
    _same(folder, earlier, json.loads(json.dumps(asdict(recipe))))
    return newest


def _same(folder: Path, earlier: dict[str, Any], recipe: dict[str, Any]) -> None:
    if earlier.get("data") != recipe["data"]:
        raise UserError(f"--data, --tokenizer: expected the text and tokenizer of the run in {folder}, got others")
    before, now = earlier["config"], recipe["config"]
    pairs = [(f"--preset, --set: {name}", before.get(name), now.get(name)) for name in {**before, **now}]
    pairs += [("--" + name.replace("_", "-"), earlier.get(name), now) for name, now in recipe.items()]
    for name, old, new in pairs:
        if old != new and name not in ("--config", "--data"):
            join = "" if ":" in name else ":"
            raise UserError(f"{name}{join} expected {old} as in the run in {folder}, got {new}")


def learning_rate(recipe: Recipe, step: int) -> float:
    """At ``step`` (from 1): linear up to ``lr`` over ``warmup`` steps, then a cosine down to a tenth of it."""
    if step <= recipe.warmup:
        return recipe.lr * step / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameter_groups(recipe.weight_decay), lr=recipe.lr, betas=BETAS, fused=True)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def loss_function(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss alone: the logits of a step would be its largest tensors."""

    def loss_of(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids, labels=input_ids, return_logits=False).loss

    return loss_of


class Run:
    """Weights, optimizer and step of one training run; :meth:`go` takes it to its end."""

    def __init__(self, folder: Path, recipe: Recipe, session: Session, text: Text, start: Path | None) -> None:
        from gdn_ops.models import HybridConfig, HybridLM

        self.folder, self.recipe, self.session, self.text, self.step = folder, recipe, session, text, 0
        torch.manual_seed(recipe.seed)
        if start is None:
            self.model = HybridLM(HybridConfig.from_dict(recipe.config)).to(session.device)
            self.optimizer = make_optimizer(self.model, recipe)
        else:
            self.model = checkpoint.load(start, session.device)
            self.optimizer = make_optimizer(self.model, recipe)
            self.step = checkpoint.restore(start, self.optimizer)
        self.model.activation_checkpointing = session.checkpointing
        self.model.train()
        self.loss_of = loss_function(self.model)

    def go(self, tokens: Tokens) -> None:
        """Trains to ``stop_at`` or to the end; saves checkpoints, the log and the curve on the way."""
        session, recipe = self.session, self.recipe
        stop = min(recipe.steps, session.stop_at or recipe.steps)
        history = History(self.folder, self.step)
        compiled = torch.compile(self.loss_of, fullgraph=True) if session.compile else self.loss_of
        held_out = tokens.validation(session.eval_batches, recipe.batch_size, recipe.seq_len)
        try:
            with Progress(recipe.steps, self.step) as progress:
                if session.compile and self.step < stop:
                    progress.say("compiling: the first step takes longer")
                while self.step < stop:
                    entry = self._advance(compiled, tokens)
                    if held_out and (self.step == recipe.steps or self.step % session.eval_every == 0):
                        entry["eval_loss"] = self._evaluate(held_out)
                    history.add(entry)
                    progress.update(**entry)
                    if self.step == stop or self.step % session.save_every == 0:
                        history.sync()
                        checkpoint.save(self.folder, self.step, self.model, self.optimizer, self.text)
                        history.draw(self._title())
        finally:
            history.close()
        if self.step == recipe.steps:
            self.text.save(self.folder)
            self.model.save_pretrained(self.folder)

    def _title(self) -> str:
        return f"{self.model.num_parameters() / 1e6:.2f}M parameters, {self.recipe.steps} steps"

    def _advance(self, loss_of: Callable[[torch.Tensor], torch.Tensor], tokens: Tokens) -> dict[str, Any]:
        """One step of the optimizer; the next entry of the log."""
        recipe, device, start = self.recipe, self.session.device, time.perf_counter()
        step = self.step + 1
        rate = learning_rate(recipe, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = tokens.batch(recipe.seed, step, recipe.batch_size * recipe.accumulate, recipe.seq_len)
        loss = torch.zeros((), device=device)
        for part in batch.to(device).split(recipe.batch_size):
            with autocast(device, recipe.dtype):
                share = loss_of(part) / recipe.accumulate
            share.backward()
            loss += share.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip or math.inf)
        value, size = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            kept = checkpoint.newest(self.folder)
            raise Failure(
                f"step {step}: expected a finite loss and gradient, got loss {value} and gradient norm {size}; "
                f"{'no checkpoint yet' if kept is None else f'the last checkpoint is {kept}'} (try a lower --lr)"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {
            "step": step,
            "loss": value,
            "lr": rate,
            "gradient_norm": size,
            "tokens": step * batch.numel(),
            "tokens_per_second": round(batch.numel() / (time.perf_counter() - start), 1),
            "time": round(time.time(), 3),
        }

    @torch.no_grad()
    def _evaluate(self, batches: list[torch.Tensor]) -> float:
        """Mean loss on the held-out windows; eager, since compiling for it would cost more than it saves."""
        device, total = self.session.device, 0.0
        self.model.eval()
        for batch in batches:
            with autocast(device, self.recipe.dtype):
                total += self.loss_of(batch.to(device)).item() * len(batch)
        self.model.train()
        return total / sum(len(batch) for batch in batches)
