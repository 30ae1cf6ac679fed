"""``gdn train``: a hybrid model on text, from nothing to a folder that ``generate`` and ``export`` read."""

from __future__ import annotations

import contextlib
import enum
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdn_ops.cli.errors import UserError, at_the_door, need
from gdn_ops.cli.options import real, whole

if TYPE_CHECKING:
    from gdn_ops.cli.text import Text


class Checkpointing(str, enum.Enum):
    """``HybridLM.activation_checkpointing``."""

    none = "none"
    elementwise = "elementwise"
    selective = "selective"
    full = "full"


class Dtype(str, enum.Enum):
    """What the arithmetic is done in; weights and optimizer are float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def command(
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT", help="Folder of the run; an earlier run in it is continued.")
    ],
    steps: Annotated[int, whole("--steps", 1, "Steps of the optimizer in the whole run.")],
    preset: Annotated[
        str, typer.Option("--preset", help="Model: tiny, gdn-0.4b, h1-1.3b, ... (gdn_ops.models.PRESETS).")
    ] = "tiny",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Another value for a field of the preset, repeatable."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text file or folder of them, repeatable; default: Python's standard library.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Hugging Face tokenizer.json; default: bytes.")
    ] = None,
    batch_size: Annotated[int, whole("--batch-size", 1, "Windows a step (a part of one, with --accumulate).")] = 8,
    accumulate: Annotated[int, whole("--accumulate", 1, "Parts that a step's batch is computed in.")] = 1,
    seq_len: Annotated[int, whole("--seq-len", 2, "Tokens a window.")] = 512,
    lr: Annotated[float, real("--lr", 0, "Highest learning rate.", above=True)] = 2e-3,
    warmup: Annotated[int | None, whole("--warmup", 0, "Steps to get there; default: a tenth, at most 1000.")] = None,
    weight_decay: Annotated[float, real("--weight-decay", 0, "AdamW's, on matrices only.")] = 0.1,
    clip: Annotated[float, real("--clip", 0, "Largest gradient norm; 0: no clipping.")] = 1.0,
    seed: Annotated[int, whole("--seed", 0, "Of the weights and of the order of the data.")] = 0,
    held_out: Annotated[float, real("--held-out", 0, "Part of the text kept for validation.", most=0.5)] = 0.01,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="auto: bfloat16 autocast on CUDA, float32 on CPU.")
    ] = Dtype.auto,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile(fullgraph=True).")] = True,
    checkpointing: Annotated[
        Checkpointing, typer.Option("--checkpointing", help="What the backward pass computes again, to save memory.")
    ] = Checkpointing.none,
    save_every: Annotated[int, whole("--save-every", 1, "Steps between checkpoints.")] = 250,
    eval_every: Annotated[int | None, whole("--eval-every", 1, "Steps between validations; default: a tenth.")] = None,
    eval_batches: Annotated[int, whole("--eval-batches", 0, "Batches a validation; 0: none.")] = 4,
    stop_at: Annotated[int | None, whole("--stop-at", 1, "End this call after that step, resumable.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Must, or must not, continue; default: if there is one.")
    ] = None,
) -> None:
    """Trains a model on text."""
    if warmup is not None and warmup > steps:
        raise UserError(f"--warmup: expected at most --steps {steps}, got {warmup}")
    need("safetensors", "gdn train", "hf")
    need("matplotlib", "the loss curve")
    from gdn_ops.cli import checkpoint, corpus, training
    from gdn_ops.cli.device import pick

    text, chosen = _text(tokenizer), pick(device)
    config = _config(preset, set_ or [], text)
    if compile_:
        _check_compiler(chosen.type)
    found = corpus.documents(data, out) if data else corpus.standard_library()
    recipe = training.Recipe(
        config=config, data=corpus.digest(found, text), steps=steps, batch_size=batch_size, accumulate=accumulate,
        seq_len=seq_len, lr=lr, warmup=min(1000, steps // 10) if warmup is None else warmup, weight_decay=weight_decay,
        clip=clip, seed=seed, dtype=_dtype(dtype, chosen.type), held_out=held_out,
    )  # fmt: skip
    session = training.Session(
        device=chosen, compile=compile_, checkpointing=checkpointing.value, save_every=save_every,
        eval_every=max(1, steps // 10) if eval_every is None else eval_every, eval_batches=eval_batches,
        stop_at=stop_at,
    )  # fmt: skip
    if resume and checkpoint.newest(out) is None:
        raise UserError(f"--resume: expected a run with a checkpoint in {out}, got none")
    with training.claimed(out), _written(out):
        start = training.enter(out, recipe, resume)
        tokens = corpus.split(corpus.tokenize(found, recipe.data, text, out, _say), held_out, seq_len)
        with at_the_door("--preset, --set"):
            run = training.Run(out, recipe, session, text, start)
        _say(f"model: {run.model.num_parameters():,} parameters, {chosen.type}, {recipe.dtype}, config in {out}")
        if start is not None:
            _say(f"continuing after step {run.step} of {steps}")
        began, first = time.perf_counter(), run.step
        try:
            run.go(tokens)
        except (KeyboardInterrupt, SystemExit) as end:
            kept = checkpoint.newest(out) is not None
            later = "goes on from the last checkpoint" if kept else "begins anew: there is no checkpoint yet"
            _say(f"interrupted after step {run.step}; the same command {later}")
            raise (typer.Exit(130) if isinstance(end, KeyboardInterrupt) else end) from None
        _report(out, run.step, first, steps, time.perf_counter() - began)


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    """Inside it, a disk that is full or fails is a matter of OUT, and of one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"--out: expected {out} to take what the run writes, got {error}") from error


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _text(tokenizer: Path | None) -> Text:
    from gdn_ops.cli.text import Bytes, TokenizerFile

    return Bytes() if tokenizer is None else TokenizerFile(tokenizer)


def _config(preset: str, overrides: list[str], text: Text) -> dict[str, Any]:
    """The preset with the overrides, and a vocabulary as large as the tokenizer's."""
    from gdn_ops.models import HybridConfig

    fields: dict[str, Any] = {"vocab_size": text.vocab_size}
    for item in overrides:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise UserError(f"--set: expected FIELD=VALUE, got {item!r}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    with at_the_door("--preset, --set"):
        config = HybridConfig.preset(preset, **fields)
    if config.vocab_size < text.vocab_size:
        least = f"at least the tokenizer's {text.vocab_size}"
        raise UserError(f"--set: expected vocab_size of {least}, got {config.vocab_size}")
    return config.to_dict()


def _dtype(dtype: Dtype, device: str) -> str:
    if dtype is not Dtype.auto:
        return dtype.value
    return "bfloat16" if device == "cuda" else "float32"


def _check_compiler(device: str) -> None:
    from gdn_ops.lowering.inductor import compiler

    if device == "cpu":
        try:
            compiler()
        except RuntimeError as error:
            raise UserError(f"--compile: {error}, or pass --no-compile") from error


def _report(out: Path, step: int, first: int, steps: int, seconds: float) -> None:
    from gdn_ops.cli import history

    entries = history.read(out / history.FILE)
    if entries:
        speeds = sorted(entry["tokens_per_second"] for entry in entries)
        held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
        measured = f", held-out loss {held_out[-1]:.4f}" if held_out else ""
        typer.echo(
            f"step {step} of {steps}: loss {entries[-1]['loss']:.4f}{measured}, median {speeds[len(speeds) // 2]:,.0f} "
            f"tokens/s, {step - first} steps in {seconds:.0f} s"
        )
    if step == steps:
        typer.echo(f"model: {out / 'model.safetensors'}\nlog: {out / history.FILE}\ncurve: {out / history.CURVE}")
    else:
        typer.echo(f"stopped before the end: the same command goes on from step {step}")
