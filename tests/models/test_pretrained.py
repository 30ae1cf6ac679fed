"""A model on disk: round trip, dtypes, damaged files, and a save that is whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch

from gdn_ops.models import HybridConfig, HybridLM, pretrained
from tests.models.models import make, tokens

safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip(tmp_path, dtype, tied):
    model = make(["G", "swa"], dtype, tie_word_embeddings=tied, rope_theta=77.0)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    again = HybridLM.from_pretrained(tmp_path / "a" / "b")
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    for (name, x), y in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(x, y) and x.dtype == y.dtype and y.requires_grad, name
        assert vars(x).get("_no_weight_decay") == vars(y).get("_no_weight_decay"), name
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_dtype_and_device_of_the_loaded(tmp_path):
    make(dtype=torch.float32).save_pretrained(str(tmp_path))
    model = HybridLM.from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match=r"dtype: expected a floating torch\.dtype, got torch\.int8"):
        HybridLM.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype: expected a floating torch\.dtype, got 'bf16'"):
        HybridLM.from_pretrained(tmp_path, dtype="bf16")


@pytest.mark.gpu
def test_from_cuda_and_to_cuda(tmp_path):
    model = make(dtype=torch.float32, device="cuda")
    model.save_pretrained(tmp_path)
    again = HybridLM.from_pretrained(tmp_path, device="cuda")
    assert {p.device.type for p in again.parameters()} == {"cuda"}
    assert HybridLM.from_pretrained(tmp_path).embedding.weight.device.type == "cpu"
    ids = tokens(2, 20, device="cuda")
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_config_is_readable_json(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("model_type") == "gdn_hybrid" and fields == model.config.to_dict()
    assert pretrained.read_config(tmp_path) == model.config


@pytest.fixture
def saved(tmp_path):
    make(dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, **changes):
    path = folder / "model.safetensors"
    weights = {**safetensors.load_file(path), **changes}
    safetensors.save_file({n: x for n, x in weights.items() if x is not None}, path)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"folder: expected a saved model with config\.json, got"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"folder: expected a saved model with model\.safetensors, got",
    ),
    "broken JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: expected JSON, got"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: expected JSON, got"),
    "list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: expected model_type 'gdn_hybrid'"),
    "other model": (
        lambda f: edit_config(f, model_type="llama"),
        r"config\.json: expected model_type 'gdn_hybrid', got 'llama'",
    ),
    "bad field": (lambda f: edit_config(f, window=0), r"config\.json: window: expected a positive integer, got 0"),
    "unknown field": (lambda f: edit_config(f, depth=3), r"config\.json: depth: expected one of the fields"),
    "field type": (lambda f: edit_config(f, vocab_size="7"), r"config\.json: vocab_size: expected a positive integer"),
    "other sizes": (
        lambda f: edit_config(f, vocab_size=41),
        r"model\.safetensors: expected embedding\.weight of shape \(41, 32\), got \(40, 32\)",
    ),
    "other pattern": (
        lambda f: edit_config(f, pattern="GG"),
        r"model\.safetensors: expected the weight layers\.1\.mixer\.conv_weight .*, got none|layers\.1\.mixer\.",
    ),
    "missing weight": (
        lambda f: edit_weights(f, **{"norm.weight": None}),
        r"model\.safetensors: expected the weight norm\.weight \(32,\), got none",
    ),
    "unknown weight": (
        lambda f: edit_weights(f, extra=torch.ones(1)),
        r"model\.safetensors: expected only this model's weights, got extra",
    ),
    "integer weight": (
        lambda f: edit_weights(f, **{"norm.weight": torch.ones(32).int()}),
        r"model\.safetensors: expected norm\.weight in a floating dtype of 16 bits or more, got torch\.int32",
    ),
    "8 bits": (
        lambda f: edit_weights(f, **{"norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
        r"model\.safetensors: expected norm\.weight in a floating dtype of 16 bits or more, got torch\.float8_e4m3fn",
    ),
    "list in the pattern": (
        lambda f: edit_config(f, pattern=[["G"]]),
        r"config\.json: pattern: expected a string or a list of strings, got \['G'\] in it",
    ),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        r"folder: expected a saved model with config\.json, got",
    ),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors: expected a safetensors file, got",
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"hello"),
        r"model\.safetensors: expected a safetensors file, got",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(saved, case):
    damage, message = DAMAGE[case]
    damage(saved)
    with pytest.raises(ValueError, match=message):
        HybridLM.from_pretrained(saved)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_device_that_cannot_hold_the_weights_is_named(saved, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device: expected one of this machine's that holds numbers, got {device}"):
        HybridLM.from_pretrained(saved, device=device)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected a saved model with config\.json, got"):
        HybridLM.from_pretrained(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"folder: expected a saved model with config\.json, got"):
        HybridLM.from_pretrained(file)
    with pytest.raises(ValueError, match="folder: expected a folder, got the file"):
        make().save_pretrained(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("fails", ["weights", "config"])
def test_a_failed_save_leaves_the_old_one_whole(saved, monkeypatch, fails):
    """Disk full while either file is written: both stay as they were and nothing is left beside them."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError("no space left on device")

    if fails == "weights":
        _, load_file, error = pretrained._safetensors()
        monkeypatch.setattr(pretrained, "_safetensors", lambda: (disk_full, load_file, error))
    else:
        monkeypatch.setattr(pretrained.json, "dumps", disk_full)
    with pytest.raises(OSError, match="no space left"):
        HybridLM(HybridConfig.preset("tiny")).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_other_weights_than_the_models_own(saved):
    model = make()
    state = {name: x * 2 for name, x in model.state_dict().items()}
    model.save_pretrained(saved, state)
    read = HybridLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(read[name], x) for name, x in state.items())
    with pytest.raises(ValueError, match=r"state_dict: expected the weight norm\.weight \(32,\), got none"):
        model.save_pretrained(saved / "new", {name: x for name, x in state.items() if name != "norm.weight"})
    with pytest.raises(ValueError, match=r"state_dict: expected norm\.weight of shape \(32,\), got \(1,\)"):
        model.save_pretrained(saved / "new", {**state, "norm.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"state_dict: expected tensors, got tuple for norm\.weight"):
        model.save_pretrained(saved / "new", {**state, "norm.weight": (1, 2)})
    assert not (saved / "new").exists()


def test_other_files_in_the_folder_stay(saved):
    (saved / "tokenizer.json").write_text("{}")
    make(dtype=torch.bfloat16).save_pretrained(saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert HybridLM.from_pretrained(saved).embedding.weight.dtype == torch.bfloat16


def test_without_safetensors_the_error_names_the_extra(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs safetensors: pip install 'gdn-ops\[hf\]'"):
        HybridLM.from_pretrained(saved)


def test_layers_that_share_weights_are_saved_each_with_its_own(tmp_path):
    model = make("GG", dtype=torch.float32)
    model.layers[1].mlp = model.layers[0].mlp
    model.save_pretrained(tmp_path)
    read, ids = HybridLM.from_pretrained(tmp_path), tokens(1, 9)
    assert torch.equal(read(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mask, mode", [(0o077, 0o600), (0o022, 0o644)])
def test_who_may_read_a_saved_model(tmp_path, mask, mode):
    """Whoever may read any new file of the process; safetensors would let nobody else."""
    before = os.umask(mask)
    try:
        make().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}
