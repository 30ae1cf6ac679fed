"""Packages made on a CUDA device: they hold cubins and run where gdn_ops cannot be imported."""

from __future__ import annotations

import zipfile

import pytest
import torch
from gdn_ops.export import export_aoti, parity
from gdn_ops.export.program import flatten_state

from tests.export import modules

pytestmark = pytest.mark.gpu
SIZES = ((1, 1), (2, 63), (1, 64), (3, 65), (2, 300))


def cubins(path) -> list[str]:
    with zipfile.ZipFile(path) as package:
        return [name for name in package.namelist() if name.endswith(".cubin")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_user_module(tmp_path, run_alone, dtype):
    model = modules.Mixer(dtype).cuda()
    inputs = modules.mixer_inputs(3, 70, dtype, "cuda")
    result = export_aoti(model, tmp_path / "out", inputs, modules.mixer_shapes())
    assert cubins(result.files["forward"])
    inputs = [modules.mixer_inputs(B, T, dtype, "cuda", seed=T) for B, T in SIZES]
    results = run_alone([(result.files["forward"], x, {}) for x in inputs])
    with torch.no_grad():
        for x, got in zip(inputs, results):
            errors = parity.compare(got, model(*x), ["y", "state", "conv"])
            assert max(errors.values()) <= parity.TOLERANCE[dtype], errors


@pytest.mark.parametrize("pattern, dtype", [("GS", torch.float32), ("GS", torch.bfloat16), ("MA", torch.bfloat16)])
def test_language_model(tmp_path, run_alone, pattern, dtype):
    from gdn_ops.models import HybridConfig, HybridLM

    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", pattern=pattern, max_position=128)).to("cuda", dtype)
    result = export_aoti(model, tmp_path / "out")
    assert result.manifest["device"] == "cuda" and "capability" in result.manifest["machine"]
    assert all(cubins(path) for path in result.files.values())
    calls, expected = [], []
    with torch.no_grad():
        for B, T in SIZES:
            ids = torch.randint(model.config.vocab_size, (B, T), device="cuda")
            calls.append((result.files["prefill"], (ids, flatten_state(model.init_state(B))), {}))
            logits, state = model.prefill(ids, model.init_state(B))
            expected.append((logits, flatten_state(state)))
            calls.append((result.files["step"], (ids[:, 0].contiguous(), flatten_state(state)), {}))
            logits, state = model.step(ids[:, 0], state)
            expected.append((logits, flatten_state(state)))
    for got, eager in zip(run_alone(calls), expected):
        errors = parity.compare(got, eager, ["logits", *eager[1]])
        assert max(errors.values()) <= parity.TOLERANCE[dtype], errors


def test_fp64_is_refused(tmp_path):
    model = modules.Mixer(torch.float64).cuda()
    with pytest.raises(ValueError, match="float64 has no Triton kernel on CUDA"):
        export_aoti(model, tmp_path / "out", modules.mixer_inputs(2, 9, torch.float64, "cuda"))
    assert not any(tmp_path.iterdir())
