"""A very small model, trained once by ``gdn train``, and its one export."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_heads": 2,
    "head_k_dim": 8,
    "head_v_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "window": 16,
}
SIZES = ["--preset", "tiny", *(word for name, n in SMALL.items() for word in ("--set", f"{name}={n}"))]
SIZES += ["--batch-size", "2", "--seq-len", "70", "--no-compile", "--device", "cpu", "--eval-batches", "1"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def run_gdn(*args: object) -> Outcome:
    """One command in this process. An exception that is no exit is a defect and raises."""
    from typer.testing import CliRunner

    from gdn_ops.cli.app import app

    result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="gdn")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def gdn():
    return run_gdn


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of made-up text, with an accent in it, and two files that are none."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    (folder / "inner").mkdir(parents=True)
    rng, words = random.Random(0), ["state", "gate", "key", "value", "chunk", "decay", "café", "rule\n"]
    for n in range(6):
        path = folder / ("inner" if n % 2 else ".") / f"{n}.txt"
        path.write_text(" ".join(rng.choices(words, k=700)), encoding="utf-8")
    (folder / "table.bin").write_bytes(b"\x00\x01\xff" * 100)
    (folder / ".hidden").write_text("not for reading")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus) -> Path:
    """The folder of a finished run of six steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    result = run_gdn("train", *SIZES, "--data", corpus, "--steps", 6, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory, trained) -> tuple[Path, Outcome]:
    """Its AOTInductor export, and what the command printed."""
    out = tmp_path_factory.mktemp("exported") / "aoti"
    result = run_gdn("export", trained, "--target", "aoti", "--out", out, "--device", "cpu")
    assert result.code == 0, result.err
    return out, result


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE in which most characters beyond ASCII take several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["state gate state gate"] * 4, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
