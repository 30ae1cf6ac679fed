"""``gdn generate``: continues a text with a trained model, or with an export of one.

An ONNX file is left to a process of its own that never imports torch: see :mod:`gdn_ops.cli.generate_onnx`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gdn_ops.cli.errors import UserError
from gdn_ops.cli.options import real, whole


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A trained model's folder, an export's, or a FILE.onnx of an export.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue; empty: a new document.")] = "",
    max_new_tokens: Annotated[int, whole("--max-new-tokens", 1, "Tokens to add at most.")] = 256,
    temperature: Annotated[float, real("--temperature", 0, "0: always the most likely token.")] = 0.8,
    top_k: Annotated[int | None, whole("--top-k", 1, "Draw from that many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, real("--top-p", 0, "Draw from the fewest tokens of this total chance.", most=1, above=True)
    ] = None,
    seed: Annotated[int, whole("--seed", 0, "Of the draws.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; an export has its own.")] = "auto",
) -> None:
    """Continues a text with a model or an export."""
    from gdn_ops.cli import generate_onnx

    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("--top-k, --top-p: expected none with --temperature 0 (the likeliest token is taken), got one")
    file = directory if directory.suffix == ".onnx" else directory / generate_onnx.MODEL
    if directory.suffix == ".onnx" or file.is_file():
        if device not in ("auto", "cpu"):
            raise UserError(f"--device: expected auto or cpu for {file}, which ONNX Runtime's CPU runs, got {device!r}")
        options = {"max-new-tokens": max_new_tokens, "temperature": temperature, "top-k": top_k, "top-p": top_p}
        _hand_over(file, {"prompt": prompt, "seed": seed, **options})

    import torch

    from gdn_ops.cli import decoding, loading
    from gdn_ops.cli import text as texts
    from gdn_ops.models.generation import Sampling

    loaded = loading.load(directory, device)
    text = texts.load(directory)
    if text.vocab_size > loaded.vocab_size:
        raise UserError(f"DIR: expected a vocabulary of {text.vocab_size} as its tokenizer's, got {loaded.vocab_size}")
    ids = list(text.encode(prompt.encode("utf-8", "surrogateescape"), "--prompt"))
    if not ids and text.end_of_text is None:
        raise UserError(
            "--prompt: expected some text, as the tokenizer has no token between documents; got no token of it"
        )
    generator = torch.Generator(loaded.device).manual_seed(seed)
    sampling = Sampling(temperature, top_k, top_p, generator)
    speed, push = decoding.Speed(), text.decoder(ids)
    _write(prompt)
    end = text.end_of_text
    for token in decoding.tokens(loaded, ids or [end], max_new_tokens, sampling, text.vocab_size, end, speed):
        _write(push(token))
    _write(push() + "\n")
    typer.echo(f"{loaded.target} on {loaded.device}: {speed}", err=True)


def _hand_over(file: Path, options: dict[str, object]) -> NoReturn:
    """This process becomes one that runs :mod:`gdn_ops.cli.generate_onnx` as a file."""
    from gdn_ops.cli import generate_onnx

    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, generate_onnx.__file__, *words, "--", str(file)])


def _write(piece: str) -> None:
    sys.stdout.buffer.write(piece.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()
