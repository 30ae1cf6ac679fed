"""The bodies in plain ONNX against the reference, in ONNX Runtime and in the onnx package's own evaluator."""

from __future__ import annotations

import pytest
import torch

from tests import oracle

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gdn_ops.lowering.onnx.conv import conv  # noqa: E402
from gdn_ops.lowering.onnx.function import OPSET  # noqa: E402
from gdn_ops.lowering.onnx.rule import BLOCK, CHUNK, linear_rule, rule  # noqa: E402
from gdn_ops.lowering.onnx.stamps import check_stamps  # noqa: E402

from gdn_ops import reference  # noqa: E402

RULE_INPUTS = {
    "q": ["B", "T", "H", "K"], "k": ["B", "T", "H", "K"], "v": ["B", "T", "HV", "V"], "g": ["B", "T", "HV"],
    "beta": ["B", "T", "HV"], "initial_state": ["B", "HV", "K", "V"],
}  # fmt: skip
RULE_OUTPUTS = {"o": RULE_INPUTS["v"], "final_state": RULE_INPUTS["initial_state"]}
CONV_INPUTS = {"x": ["B", "T", "D"], "weight": ["D", "W"], "bias": ["D"], "initial_state": ["B", "D", "S"]}
CONV_OUTPUTS = {"y": CONV_INPUTS["x"], "final_state": CONV_INPUTS["initial_state"]}
SCALE = 0.3


def model_of(function, inputs, outputs, sizes=None, **attributes):
    """A model of one node that the function is the body of; it passes the full checker. ``sizes`` fixes dimensions."""
    from onnx import TensorProto, helper

    node = helper.make_node(function.name, list(inputs), list(outputs), domain=function.domain, **attributes)
    values = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [(sizes or {}).get(n, n) for n in shape])
            for name, shape in group.items()
        ]
        for group in (inputs, outputs)
    ]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(function.domain, 1)]
    graph = helper.make_graph([node], "one_node", *values)
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    assert check_stamps(model, OPSET) == {"ai.onnx": OPSET, function.domain: 1}
    return model


def runtime(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def evaluator(model):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model)


def run(session, tensors):
    feeds = {name: x.numpy() for name, x in tensors.items() if name != "cu_seqlens"}
    return [torch.from_numpy(x.copy()) for x in session.run(None, feeds)]


def rule_model(chunk, block):
    return model_of(rule(chunk, block), RULE_INPUTS, RULE_OUTPUTS, scale=SCALE)


@pytest.fixture(scope="module")
def rule_session():
    return runtime(rule_model(CHUNK, BLOCK))


@pytest.fixture(scope="module")
def linear_session():
    return runtime(linear_model(CHUNK))


def linear_model(chunk):
    return model_of(
        linear_rule(chunk), {n: x for n, x in RULE_INPUTS.items() if n != "beta"}, RULE_OUTPUTS, scale=SCALE
    )


def linear_inputs(*sizes, **options):
    return {n: x for n, x in oracle.make_inputs(*sizes, **options).items() if n != "beta"}


def check_rule(session, inputs):
    o, state = run(session, inputs)
    expected = oracle.expected(inputs, scale=SCALE)
    tolerance = oracle.TOLERANCE[torch.float32].values
    oracle.assert_close(o, expected["o"], tolerance, "o")
    oracle.assert_close(state, expected["final_state"], tolerance, "final_state")


@pytest.mark.parametrize("shape", [(2, 2, 2, 16, 24), (1, 2, 6, 24, 8), (3, 1, 4, 8, 8)], ids=str)
def test_the_rule_at_every_kind_of_length(rule_session, shape):
    """One token, whole and ragged chunks; equal and grouped heads; from a state."""
    B, H, HV, K, V = shape
    C = CHUNK
    for T in (1, 2, C - 1, C, C + 1, 2 * C, 3 * C + 5):
        check_rule(rule_session, oracle.make_inputs(B, T, H, HV, K, V, seed=T, initial_state=True))


@pytest.mark.parametrize("shape", [(2, 2, 2, 16, 24), (1, 1, 6, 24, 8)], ids=str)
def test_linear_attention_at_every_kind_of_length(linear_session, shape):
    B, H, HV, K, V = shape
    C = CHUNK
    for T in (1, 2, C - 1, C, C + 1, 3 * C + 5):
        check_rule(linear_session, linear_inputs(B, T, H, HV, K, V, seed=T, initial_state=True))


def test_linear_attention_in_the_evaluator_and_after_strong_gates(linear_session):
    session = evaluator(linear_model(8))
    for T in (1, 7, 8, 20):
        check_rule(session, linear_inputs(2, T, 2, 4, 8, 4, seed=T, initial_state=True))
    inputs = linear_inputs(2, 2 * CHUNK + 7, 2, 4, 16, 8, initial_state=True)
    inputs["g"][:, 3], inputs["g"][0, 40, 1], inputs["g"][:, CHUNK] = -1.0e4, -torch.inf, -torch.inf
    check_rule(linear_session, inputs)


@pytest.mark.parametrize("T", [1, 40])
def test_the_rule_where_every_size_is_fixed(T):
    """The runtime then decides the branches while it loads the file."""
    sizes = {"B": 2, "T": T, "H": 2, "HV": 4, "K": 8, "V": 8}
    session = runtime(model_of(rule(), RULE_INPUTS, RULE_OUTPUTS, sizes, scale=SCALE))
    check_rule(session, oracle.make_inputs(2, T, 2, 4, 8, 8, initial_state=True))


@pytest.mark.parametrize("chunk,block", [(2, 2), (8, 2), (16, 16), (16, 4), (64, 16)])
def test_other_chunks_and_blocks_give_the_same_numbers(chunk, block):
    session = runtime(rule_model(chunk, block))
    for T in (1, chunk, 2 * chunk + 1):
        check_rule(session, oracle.make_inputs(2, T, 2, 4, 16, 8, seed=chunk, initial_state=True))


def test_the_evaluator_of_the_onnx_package_agrees():
    session = evaluator(rule_model(8, 4))
    for T in (1, 7, 8, 20):
        check_rule(session, oracle.make_inputs(2, T, 2, 4, 8, 4, seed=T, initial_state=True))


def test_strong_gates_forget_exactly(rule_session):
    """After a gate of -1e4 or -inf nothing earlier shows, not even a state of infinities' size, and what comes after
    keeps its digits."""
    T = 2 * CHUNK + 7
    inputs = oracle.make_inputs(2, T, 2, 4, 16, 8, initial_state=True)
    inputs["g"][:, 3] = -1.0e4
    inputs["g"][0, 40, 1] = -torch.inf
    inputs["g"][:, CHUNK] = -torch.inf
    check_rule(rule_session, inputs)
    changed = {**inputs, "initial_state": inputs["initial_state"] * 1e6}
    (o, state), (o_changed, state_changed) = run(rule_session, inputs), run(rule_session, changed)
    assert torch.equal(o[:, 3:], o_changed[:, 3:]) and torch.equal(state, state_changed)
    assert not torch.equal(o[:, :3], o_changed[:, :3])
    one = {name: x if name == "initial_state" or x is None else x[:, 3:4] for name, x in inputs.items()}
    check_rule(rule_session, {name: x if x is None else x.contiguous() for name, x in one.items()})


def test_gates_that_are_no_numbers_show(rule_session):
    inputs = oracle.make_inputs(1, 50, 1, 2, 8, 8, initial_state=True)
    inputs["g"][0, 20, 1] = torch.nan
    o, state = run(rule_session, inputs)
    assert o[0, 20:, 1].isnan().all() and state[0, 1].isnan().all()
    assert o[0, :, 0].isfinite().all() and state[0, 0].isfinite().all()


def test_repeated_keys_stay_accurate(rule_session):
    """The inverse of a chunk of equal keys, written with full strength and never forgotten."""
    inputs = oracle.make_inputs(1, 100, 2, 2, 16, 16, initial_state=True)
    inputs["k"][:] = inputs["k"][:, :1]
    inputs["beta"][:], inputs["g"][:] = 0.999, -1e-4
    check_rule(rule_session, inputs)


def test_as_many_nodes_at_every_length():
    """The file is made before a length is known; what a chunk more costs is an iteration, not nodes."""
    function = rule()

    def count(nodes):
        inner = [a.g.node for node in nodes for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        return len(nodes) + sum(count(graph) for graph in inner)

    assert count(function.node) < 320
    assert {x.domain: x.version for x in function.opset_import} == {"": 18}


@pytest.mark.parametrize("function", [rule(), linear_rule(), conv()], ids=lambda x: x.name)
def test_nothing_is_made_in_vain(function):
    """ONNX Runtime warns of each value that no node takes, once a layer."""
    made, taken = set(), set(function.output)

    def collect(nodes):
        for node in nodes:
            made.update(node.output)
            taken.update(node.input)
            for graph in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
                taken.update(x.name for x in graph.output)
                collect(graph.node)

    collect(function.node)
    assert made <= taken, made - taken


@pytest.mark.parametrize("sizes", [dict(chunk=48), dict(chunk=1), dict(block=3)], ids=str)
def test_sizes_that_are_no_powers_of_two_are_refused(sizes):
    ((name, size),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}: expected a power of two from 2, got {size}"):
        rule(**sizes)


@pytest.mark.parametrize("open_session", [runtime, evaluator])
@pytest.mark.parametrize("silu", [0, 1])
def test_the_convolution(open_session, silu):
    session = open_session(model_of(conv(), CONV_INPUTS, CONV_OUTPUTS, silu=silu))
    generator = torch.Generator().manual_seed(3)
    for W in (2, 3, 4):
        for B, T in ((1, 1), (2, 2), (3, 9)):
            shapes = {"x": (B, T, 6), "weight": (6, W), "bias": (6,), "initial_state": (B, 6, W - 1)}
            inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            y, state = run(session, inputs)
            wide = {name: x.double() for name, x in inputs.items()}
            expected, after = reference.causal_conv1d(**wide, activation="silu" if silu else None)
            oracle.assert_close(y, expected, 1e-6, "y")
            assert torch.equal(state.double(), after), "the last inputs are copied, not computed"
