"""``gdn generate``: the text that the model gives, streamed; and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdn_ops.cli import decoding
from gdn_ops.cli.text import TokenizerFile
from gdn_ops.models import HybridLM
from gdn_ops.models.generation import Sampling
from tests.cli.conftest import SIZES

PROMPT = "gate café "


def continued(folder, prompt: bytes, count: int, **how) -> str:
    """What ``HybridLM.generate`` gives for these bytes."""
    model, ids = HybridLM.from_pretrained(folder), torch.tensor([list(prompt)])
    if "seed" in how:
        how["generator"] = torch.Generator().manual_seed(how.pop("seed"))
    with torch.no_grad():
        result = model.generate(ids, max_new_tokens=count, eos_token_id=0, **how)[0].tolist()
    text = bytes(result[: result.index(0, 1)] if 0 in result[1:] else result)
    return text.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("args", "how"),
    [
        (["--temperature", 0], {}),
        (["--seed", 5], {"temperature": 0.8, "seed": 5}),
        (
            ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.9],
            {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 0},
        ),
    ],
)
def test_text_is_the_models(gdn, trained, args, how):
    result = gdn("generate", trained, "--prompt", PROMPT, "--max-new-tokens", 40, "--device", "cpu", *args)
    assert result.code == 0
    assert result.out == continued(trained, PROMPT.encode(), 40, **how) + "\n"
    assert result.err.startswith(f"eager on cpu: prompt {len(PROMPT.encode())} tokens at ")
    assert re.search(r" [1-9]\d* more at [\d,]+ tokens/s\n$", result.err)


def test_a_new_document_and_seeds(gdn, trained):
    results = [gdn("generate", trained, "--max-new-tokens", 30, "--seed", seed).out for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]
    assert results[0] == continued(trained, b"\0", 30, temperature=0.8, seed=1).removeprefix("\0") + "\n"


def test_the_end_of_text_ends_it():
    """A model that counts: token n is followed by n + 1."""
    steps = []

    def logits_after(ids):
        return torch.nn.functional.one_hot((ids + 1) % 8, 8).float()

    def step(ids, state):
        steps.append(int(ids))
        return logits_after(ids), state

    runner = SimpleNamespace(init_state=lambda batch: None, prefill=lambda i, s: (logits_after(i), s), step=step)
    loaded, speed = SimpleNamespace(runner=runner, device=torch.device("cpu")), decoding.Speed()
    greedy = Sampling()
    assert list(decoding.tokens(loaded, [1, 2], 9, greedy, 8, 5, speed)) == [3, 4]
    assert speed.prompt == 2 and speed.steps == 2 and steps == [3, 4]
    assert list(decoding.tokens(loaded, [1, 2], 3, greedy, 8, None, speed)) == [3, 4, 5]
    assert list(decoding.tokens(loaded, [1, 2], 3, greedy, 4, None, speed)) == [3, 0, 1]  # ids from 4 on have no text


def test_with_a_tokenizer_file(gdn, corpus, tokenizer_file, tmp_path):
    run = tmp_path / "run"
    sizes = [*SIZES, "--tokenizer", tokenizer_file, "--data", corpus, "--steps", 2, "--out", run]
    assert gdn("train", *sizes).code == 0
    text, model = TokenizerFile(run / "tokenizer.json"), HybridLM.from_pretrained(run)
    assert model.config.vocab_size == text.vocab_size and text.content == tokenizer_file.read_bytes()
    result = gdn("generate", run, "--prompt", "state gate", "--temperature", 0, "--max-new-tokens", 12)
    ids = text.encode(b"state gate")
    with torch.no_grad():
        whole = model.generate(torch.tensor([ids]), 12, eos_token_id=text.end_of_text)[0].tolist()
    assert result.code == 0 and result.out == text.tokenizer.decode(whole, skip_special_tokens=True) + "\n"


def test_a_reader_that_leaves_early(trained):
    code = "from gdn_ops.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", str(trained), "--max-new-tokens", "3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=200) == 1 and err == ""


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["/no/such/folder"], "DIR: expected a folder with a model or an export, got /no/such/folder"),
        (["{trained}", "--top-k", 3, "--temperature", 0], "--top-k, --top-p: expected none with --temperature 0"),
        (["{trained}", "--device", "cuda:77"], "CUDA devices, got 'cuda:77'"),
        (["{trained}/checkpoints"], "DIR: expected config.json and model.safetensors in it"),
    ],
)
def test_refusals(gdn, trained, args, told):
    result = gdn("generate", *(str(arg).replace("{trained}", str(trained)) for arg in args))
    assert result.code == 2 and not result.out and told in result.err and result.err.count("\n") == 1


def test_folders_that_are_not_whole(gdn, trained, tmp_path):
    def told(folder) -> str:
        result = gdn("generate", folder)
        assert result.code == 2 and not result.out and result.err.count("\n") == 1, result
        return result.err

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "text.json").unlink()
    assert "DIR: expected text.json (gdn train writes it)" in told(copy)
    (copy / "config.json").unlink()
    assert f"the last checkpoint is {copy / 'checkpoints' / 'step-00000006'}" in told(copy)
    assert gdn("generate", copy / "checkpoints" / "step-00000006", "--max-new-tokens", 2).code == 0
    (copy / "manifest.json").write_text("{}")
    assert "DIR: out_dir: expected format" in told(copy)
    assert f"got {copy / 'manifest.json'}, which is a file" in told(copy / "manifest.json")


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "manifest.json").write_text("[]"), "expected a dict in {}/manifest.json, got []"),
        (
            lambda folder: _edit(folder / "manifest.json", programs={}),
            "expected an export of a language model, got one",
        ),
        (lambda folder: _edit(folder / "manifest.json", device=None), "expected device str in {}/manifest.json, got"),
        (lambda folder: _edit(folder / "manifest.json", config=None), "expected config dict in {}/manifest.json, got"),
        (lambda folder: (folder / "parity.json").write_text("{}"), "expected passed in {}/parity.json, got none"),
        (lambda folder: (folder / "parity.json").unlink(), "expected an export with a parity.json, got {} (No such"),
        (lambda folder: _edit(folder / "text.json", tokenizer=5), "DIR: expected {}/text.json to describe a tokenizer"),
        (
            lambda folder: _edit(folder / "manifest.json", format="gdn_ops.onnx", target="ort"),
            "DIR: expected model.onnx in it, as in an export for ort, got {} without",
        ),
    ],
)
def test_exports_that_are_not_whole(gdn, exported, tmp_path, damage, told):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    damage(copy)
    result = gdn("generate", copy)
    assert result.code == 2 and not result.out and result.err.count("\n") == 1, result
    assert told.format(copy) in result.err


def test_a_tokenizer_larger_than_the_model(gdn, trained, tokenizer_file, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    TokenizerFile(tokenizer_file).save(copy)
    result = gdn("generate", copy)
    assert result.code == 2 and "DIR: expected a vocabulary of" in result.err
