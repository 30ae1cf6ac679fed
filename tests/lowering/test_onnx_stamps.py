"""Opsets are raised only where every node means the same, and a stamp that lies is found."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", minversion="1.23")
pytest.importorskip("onnxscript")

from gdn_ops.lowering.onnx import lower  # noqa: E402
from gdn_ops.lowering.onnx.stamps import check_stamps, raise_opset  # noqa: E402


def model_of(text: str):
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')


def as_ir(text: str):
    import onnx_ir as ir

    return ir.from_proto(model_of(text))


def test_raised_to_what_is_asked():
    import onnx_ir as ir

    model = as_ir("agraph (float[N] x) => (float[N] y) { z = Softplus (x) s = Shape (z) y = Reshape (z, s) }")
    raise_opset(model, 27)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert check_stamps(proto, 27) == {"ai.onnx": 27}
    assert [node.op_type for node in proto.graph.node] == ["Softplus", "Shape", "Reshape"]


RULE = (
    "agraph (float[B,T,2,4] q, float[B,T,2,4] k, float[B,T,2,4] v, float[B,T,2] g_in, float[B,T,2] b, "
    "float[B,2,4,4] s) => (float[B,T,2,4] o, float[B,2,4,4] n) { g = Softplus (g_in) "
    "o, n = gdn_ops.GatedDeltaRule <scale = 0.5> (q, k, v, g, b, s) }"
)


@pytest.mark.parametrize("first", ["raise", "lower"])
def test_lowered_before_or_after_it_is_raised(first):
    import onnx_ir as ir

    model = as_ir(RULE)
    model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    if first == "raise":
        raise_opset(model, 27)
    assert lower(model, "onnx27").opset == 27
    if first == "lower":
        assert model.opset_imports[""] == 18
        raise_opset(model, 27)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert check_stamps(proto, 27) == {"ai.onnx": 27}
    assert "LinearAttention" in {node.op_type for node in proto.graph.node}


def test_a_node_that_changed_is_refused():
    """Mod takes other types since opset 28, which is beyond what is known to mean the same."""
    model = as_ir("agraph (int64[N] x) => (int64[N] y) { y = Mod (x, x) }")
    with pytest.raises(ValueError, match="Mod changed between opset 25 and 28; use target 'portable'"):
        raise_opset(model, 28)
    with pytest.raises(ValueError, match="expected an onnx package that knows opset 99"):
        raise_opset(as_ir("agraph (int64[N] x) => (int64[N] y) { y = Abs (x) }"), 99)


STANDARD = (
    "agraph (float[B,T,D] q, float[B,T,D] k, float[B,T,D] v, float[B,H,D,D] s, float[B,T,H] g, float[B,T,H] b) "
    "=> (float[B,T,D] o, float[B,H,D,D] n) { o, n = LinearAttention <q_num_heads = 1, kv_num_heads = 1> "
    "(q, k, v, s, g, b) }"
)


def test_a_stamp_older_than_a_node_is_found():
    """What torch's exporter returns when it is asked for opset 27."""
    with pytest.raises(ValueError, match="graph: LinearAttention is in no opset up to 18, which is stamped"):
        check_stamps(model_of(STANDARD), 18)
    raised = model_of(STANDARD)
    raised.opset_import[0].version = 27
    assert check_stamps(raised, 27) == {"ai.onnx": 27}
    with pytest.raises(ValueError, match="model: expected opset 18, got 27"):
        check_stamps(raised, 18)


def test_nodes_of_subgraphs_and_functions_are_looked_at():
    inner = "agraph (bool c, float[N] x) => (float[N] y) { y = If (c) <then_branch = a () => (t) { t = %s (x) }, "
    inner += "else_branch = b () => (e) { e = Identity (x) }> }"
    check_stamps(model_of(inner % "Abs"), 18)
    with pytest.raises(ValueError, match="SwiGLU is in no opset up to 18"):
        check_stamps(model_of(inner % "SwiGLU"), 18)
    with pytest.raises(ValueError, match="graph: Thing is of the domain 'mine', which is not imported"):
        check_stamps(model_of(inner % "mine.Thing"), 18)
    model = model_of("agraph (float[N] x) => (float[N] y) { y = mine.Thing (x) }")
    model.opset_import.add(domain="mine", version=1)
    with pytest.raises(ValueError, match="graph: mine::Thing has neither a schema nor a body in the file"):
        check_stamps(model, 18)
    text = '<opset_import: ["" : 18], domain: "mine"> Thing (x) => (y) { y = %s (x) }'
    model.functions.append(onnx.parser.parse_function(text % "Abs"))
    assert check_stamps(model, 18) == {"ai.onnx": 18, "mine": 1}
    model.functions[0].CopyFrom(onnx.parser.parse_function(text % "SwiGLU"))
    with pytest.raises(ValueError, match="function mine::Thing: SwiGLU is in no opset up to 18"):
        check_stamps(model, 18)


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="target: expected one of portable, ort, onnx27, got 'tensorrt'"):
        lower(as_ir("agraph (float[N] x) => (float[N] y) { y = Abs (x) }"), "tensorrt")
