"""Artifacts of the paper's other models: Mamba2, DeltaNet and full attention, in a package and in ONNX files."""

from __future__ import annotations

import pytest
import torch
from gdn_ops.export import export_aoti, export_onnx, parity
from gdn_ops.export.program import flatten_state

from gdn_ops.models import HybridConfig, HybridLM
from tests.export.onnx_exports import TARGETS
from tests.models.models import SIZES, make, tokens

NODES = {
    "portable": {"gdn_ops::GatedDeltaRule": 2, "gdn_ops::GatedLinearAttention": 2, "gdn_ops::CausalConv1d": 4},
    "ort": {
        "com.microsoft::LinearAttention": 2, "gdn_ops::GatedLinearAttention": 2,
        "com.microsoft::CausalConvWithState": 4,
    },
    "onnx27": {"ai.onnx::LinearAttention": 4, "ai.onnx::CausalConvWithState": 4},
}  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_package_runs_alone(tmp_path, run_alone):
    """What ``export_aoti`` proves in this process, once more where gdn_ops cannot be imported."""
    model = make("MA", torch.float32)
    result = export_aoti(model, tmp_path / "out")
    assert "gdn::chunk_gated_linear_attention" in result.manifest["programs"]["prefill"]["operators"]
    ids, token = tokens(2, 65), tokens(2)
    logits, state = model.prefill(ids, model.init_state(2))
    step_logits, step_state = model.step(token, state)
    wanted = [(logits, flatten_state(state)), (step_logits, flatten_state(step_state))]
    got = run_alone(
        [
            (result.files["prefill"], (ids, flatten_state(model.init_state(2))), {}),
            (result.files["step"], (token, flatten_state(state)), {}),
        ]
    )
    for result, want in zip(got, wanted):
        errors = parity.compare(result, want, ["logits", *want[1]])
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_one_file_holds_both_rules(target, tmp_path):
    """Both branches have two layers of either rule; prefill, prefill again and a step from the file's own states."""
    pytest.importorskip("onnx", minversion="1.23")
    pytest.importorskip("onnxruntime")
    from gdn_ops.export.onnx_session import Session

    model = make("MD", torch.float32)
    result = export_onnx(model, tmp_path / "out", target)
    (program,) = result.manifest["programs"].values()
    assert {**program["nodes"]["kernels"], **program["nodes"]["bodies"]} == NODES[target]
    session = Session(result.files["model.onnx"])
    eager_state, state = model.init_state(2), list(flatten_state(model.init_state(2)).values())
    for T in (33, 70, 1):
        ids = tokens(2, T, seed=T)
        logits, *state = session(ids, *state)
        eager, eager_state = model.prefill(ids, eager_state)
        errors = parity.compare([logits, *state], (eager, flatten_state(eager_state)), session.outputs)
        assert max(errors.values()) < 1e-5, (T, errors)
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transformer", "deltanet", "h2"])
def test_presets_compile_train_and_export(family, tmp_path):
    """One period of a preset's layers, narrow: a graph without breaks that learns, then a package and an ONNX file,
    each proved against the trained model where it is made. These three have every kind of layer."""
    pytest.importorskip("onnx", minversion="1.23")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    preset = HybridConfig.preset(f"{family}-0.4b")
    narrow = {**SIZES, "num_hidden_layers": len(preset.pattern)}
    model = HybridLM(HybridConfig.preset(f"{family}-0.4b", **narrow))
    step, ids = torch.compile(model, fullgraph=True), tokens(2, 70)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(step(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    assert {"prefill", "step"} <= set(export_aoti(model, tmp_path / "aoti").files)
    assert "model.onnx" in export_onnx(model, tmp_path / "onnx", "portable").files
