"""What the nodes of ``translation`` become in a target, and the bodies that go into the file with them.

The rule is computed in fp32 in every target but ``ort`` with 16-bit weights: the standard gives the decay the dtype of
the query, and a log decay in 16 bits would be another model. So q, k and v are cast up before the node and its output
down behind it; states are fp32 by contract. The convolution is cast the same way, since ONNX Runtime's kernels for CPU
are fp32 only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gdn_ops.lowering.onnx import contrib
from gdn_ops.lowering.onnx.conv import conv
from gdn_ops.lowering.onnx.function import CONTRIB, OPSET
from gdn_ops.lowering.onnx.rule import linear_rule, rule
from gdn_ops.lowering.onnx.translation import CONV, DOMAIN, LINEAR, RULE

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import FunctionProto

TARGETS = ("portable", "ort", "onnx27")
# Floating types, and those that hold every number of them.
WIDER = {"FLOAT16": ("FLOAT", "DOUBLE"), "BFLOAT16": ("FLOAT", "DOUBLE"), "FLOAT": ("DOUBLE",)}


class Lowered(NamedTuple):
    """``nodes`` counts what stands for the operators, by ``domain::name`` (``ai.onnx`` for the standard's)."""

    nodes: dict[str, int]
    opset: int


class _Build:
    """Collects the nodes that take one node's place."""

    def __init__(self, node: ir.Node, number: int) -> None:
        import onnx_ir as ir

        self.number = number
        self.ir, self.node, self.tape, self.float = ir, node, ir.tape.Tape(), ir.DataType.FLOAT

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def fused(self, domain: str, kind: str, inputs: list, outputs: list[tuple], **attributes: Any) -> list[ir.Value]:
        """A node of several outputs, each ``(dtype, shape or None)``."""
        name = f"{kind}_{self.number}"  # a name of its own: a runtime's report of what ran tells nodes by it
        count = len(outputs)
        values = self.tape.op_multi_out(kind, inputs, attributes, num_outputs=count, domain=domain, name=name)
        for value, (dtype, shape) in zip(values, outputs):
            value.dtype = dtype
            value.shape = None if shape is None else self.ir.Shape(shape)
        return list(values)

    def ints(self, *values: int) -> ir.Value:
        return self.op("Constant", value_ints=list(values))

    def cast(self, value: ir.Value, dtype: Any) -> ir.Value:
        if value.dtype == dtype:
            return value
        result = self.op("Cast", value, to=int(dtype))
        result.dtype, result.shape = dtype, value.shape
        return result

    def permute(self, value: ir.Value, *perm: int) -> ir.Value:
        result = self.op("Transpose", value, perm=list(perm))
        result.dtype = value.dtype
        result.shape = None if value.shape is None else self.ir.Shape([value.shape[i] for i in perm])
        return result

    def sizes(self, value: ir.Value, axes: int) -> list[int]:
        """The last ``axes`` sizes of a value, which must be fixed in the file."""
        shape = list(value.shape or ())[-axes:]
        if len(shape) < axes or not all(isinstance(size, int) for size in shape):
            raise ValueError(
                f"{self.node.op_type}: expected heads and features of fixed size, got shape {value.shape} of "
                f"{value.name}: leave only batch and length dynamic"
            )
        return shape

    def pack(self, value: ir.Value, width: int) -> ir.Value:
        """``[B, T, heads, features]`` to ``[B, T, heads * features]``, also where B or T is 0."""
        batch_length = self.op("Shape", value, start=0, end=2)
        return self.op("Reshape", value, self.op("Concat", batch_length, self.ints(width), axis=0), allowzero=1)

    def unpack(self, value: ir.Value, *sizes: int) -> ir.Value:
        batch_length = self.op("Shape", value, start=0, end=2)
        return self.op("Reshape", value, self.op("Concat", batch_length, self.ints(*sizes), axis=0), allowzero=1)

    def replace(self, *values: ir.Value) -> None:
        """Puts the collected nodes in the node's place; its outputs' shapes and dtypes are the new ones'."""
        for new, old in zip(values, self.node.outputs):
            new.dtype, new.shape = old.dtype or new.dtype, old.shape  # what nobody uses may have come without a dtype
        self.ir.convenience.replace_nodes_and_values(
            self.node.graph, self.node, [self.node], self.tape.nodes, list(self.node.outputs), list(values)
        )


def _wide(build: _Build) -> list[ir.Value]:
    return [build.cast(value, build.float) for value in build.node.inputs]


def _portable_rule(build: _Build) -> str:
    """Either rule, as the local function of its own name."""
    q, *_ = build.node.inputs
    outputs = [(build.float, x.shape) for x in build.node.outputs]
    scale, kind = build.node.attributes["scale"].as_float(), build.node.op_type
    o, state = build.fused(DOMAIN, kind, _wide(build), outputs, scale=scale)
    build.replace(build.cast(o, q.dtype), state)
    return f"{DOMAIN}::{kind}"


def _portable_conv(build: _Build) -> str:
    dtype = build.node.inputs[0].dtype
    outputs = [(build.float, x.shape) for x in build.node.outputs]
    silu = build.node.attributes["silu"].as_int()
    y, state = build.fused(DOMAIN, CONV, _wide(build), outputs, silu=silu)
    build.replace(build.cast(y, dtype), build.cast(state, dtype))
    return f"{DOMAIN}::{CONV}"


def _linear_attention(build: _Build, domain: str, repeat: bool) -> None:
    """``LinearAttention`` on packed heads; with ``repeat``, each value head gets a query and key head of its own."""
    (H, K), (HV, V) = build.sizes(build.node.inputs[0], 2), build.sizes(build.node.inputs[2], 2)
    dtype, (q, k, v, *gates, state) = build.node.inputs[0].dtype, _wide(build)
    if repeat and HV > H:
        heads = build.ints(*(i // (HV // H) for i in range(HV)))
        q, k, H = build.op("Gather", q, heads, axis=2), build.op("Gather", k, heads, axis=2), HV
    inputs = [build.pack(q, H * K), build.pack(k, H * K), build.pack(v, HV * V), state, *gates]
    packed = None if build.node.outputs[0].shape is None else [*build.node.outputs[0].shape[:2], HV * V]
    outputs = [(build.float, packed), (build.float, build.node.outputs[1].shape)]
    attributes = {"scale": _scale(build), "q_num_heads": H, "kv_num_heads": HV}
    attributes["update_rule"] = "gated_delta" if build.node.op_type == RULE else "gated"
    o, state = build.fused(domain, "LinearAttention", inputs, outputs, **attributes)
    build.replace(build.cast(build.unpack(o, HV, V), dtype), state)


def _scale(build: _Build) -> float:
    scale = build.node.attributes["scale"].as_float()
    if scale == 0.0:
        raise ValueError(
            "scale: expected another number than 0, which the standard takes for 1/sqrt(K): "
            "use target 'portable', or multiply the output by 0"
        )
    return scale


def _ort_rule(build: _Build) -> str:
    q, k, v, *_ = build.node.inputs
    if q.dtype == build.float:
        _linear_attention(build, CONTRIB, repeat=False)
        return f"{CONTRIB}::LinearAttention"
    g, beta, state = _wide(build)[3:]
    build.sizes(q, 2), build.sizes(v, 2)
    first = build.node.outputs[1].shape
    v_major = None if first is None else [first[0], first[1], first[3], first[2]]
    outputs = [(q.dtype, build.node.outputs[0].shape), (build.float, v_major)]
    inputs = [q, k, v, None, g, beta, build.permute(state, 0, 1, 3, 2)]
    o, state = build.fused(CONTRIB, "GatedDeltaNet", inputs, outputs, scale=_scale(build))
    build.replace(o, build.permute(state, 0, 1, 3, 2))
    return f"{CONTRIB}::GatedDeltaNet"


def _ort_conv(build: _Build) -> str:
    dtype, (x, weight, bias, state) = build.node.inputs[0].dtype, _wide(build)
    silu = build.node.attributes["silu"].as_int()
    before = build.permute(state, 0, 2, 1)
    after = None if build.node.outputs[1].shape is None else [build.node.outputs[1].shape[i] for i in (0, 2, 1)]
    outputs = [(build.float, build.node.outputs[0].shape), (build.float, after)]
    inputs = [x, build.op("Unsqueeze", weight, build.ints(1)), bias, before]
    # The body that goes into the file is one for all nodes, so the activation stays outside the node.
    y, state = build.fused(CONTRIB, "CausalConvWithState", inputs, outputs, channels_last=1, activation="none")
    y = build.op("Mul", y, build.op("Sigmoid", y)) if silu else y
    y.dtype = build.float
    build.replace(build.cast(y, dtype), build.cast(build.permute(state, 0, 2, 1), dtype))
    return f"{CONTRIB}::CausalConvWithState"


def _standard_rule(build: _Build) -> str:
    _linear_attention(build, "", repeat=True)
    return "ai.onnx::LinearAttention"


def _standard_conv(build: _Build) -> str:
    dtype, (x, weight, bias, state) = build.node.inputs[0].dtype, _wide(build)
    activation = "silu" if build.node.attributes["silu"].as_int() else "none"
    y_shape = build.node.outputs[0].shape
    outputs = [
        (build.float, None if y_shape is None else [y_shape[i] for i in (0, 2, 1)]),
        (build.float, build.node.outputs[1].shape),
    ]
    inputs = [build.permute(x, 0, 2, 1), build.op("Unsqueeze", weight, build.ints(1)), bias, state]
    y, state = build.fused("", "CausalConvWithState", inputs, outputs, activation=activation)
    build.replace(build.cast(build.permute(y, 0, 2, 1), dtype), build.cast(state, dtype))
    return "ai.onnx::CausalConvWithState"


_RULES: dict[str, dict[str, Callable[[_Build], str]]] = {
    "portable": {RULE: _portable_rule, LINEAR: _portable_rule, CONV: _portable_conv},
    # A file may hold both rules, and a function of one name has one body.
    "ort": {RULE: _ort_rule, LINEAR: _portable_rule, CONV: _ort_conv},
    "onnx27": {RULE: _standard_rule, LINEAR: _standard_rule, CONV: _standard_conv},
}
OPSETS = {"portable": OPSET, "ort": OPSET, "onnx27": 27}


def _functions(names: list[str]) -> list[FunctionProto]:
    """The bodies of the nodes called ``names``, and those that they call."""
    makers = {
        f"{DOMAIN}::{RULE}": [rule],
        f"{DOMAIN}::{LINEAR}": [linear_rule],
        f"{DOMAIN}::{CONV}": [conv],
        f"{CONTRIB}::LinearAttention": [rule, contrib.linear_attention],
        f"{CONTRIB}::GatedDeltaNet": [rule, contrib.gated_delta_net],
        f"{CONTRIB}::CausalConvWithState": [conv, contrib.causal_conv_with_state],
    }
    return [make() for make in dict.fromkeys(make for name in names for make in makers.get(name, ()))]


def lower(model: ir.Model, target: str) -> Lowered:
    """Replaces, in place, every node of the domain ``gdn_ops`` by what ``target`` has for it, and adds the bodies.

    The model keeps the opset that it has; ``stamps.raise_opset``, before or after, brings it to that of the result.

    Raises:
        ValueError: ``target`` unknown, or a node that it cannot express.
    """
    import onnx_ir as ir

    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    found = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN]
    nodes: dict[str, int] = {}
    for number, node in enumerate(found):
        if node.inputs[0].dtype == ir.DataType.DOUBLE:
            raise ValueError(
                f"model: float64 has no form in target {target!r}, whose rule is computed in float32: "
                "use model.float(), or export_aoti for float64 on CPU"
            )
        name = _RULES[target][node.op_type](_Build(node, number))
        nodes[name] = nodes.get(name, 0) + 1
    _without_round_trips(model)
    _distinct_names(model)
    for function in map(ir.serde.deserialize_function, _functions(sorted(nodes))):
        model.functions[function.identifier()] = function
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    used |= {domain for function in model.functions.values() for domain in function.opset_imports}
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update({domain: 1 for domain in (DOMAIN, CONTRIB) if domain in used})
    return Lowered(nodes, OPSETS[target])


def _without_round_trips(model: ir.Model) -> None:
    """Gives the value itself to those who read it cast to a wider type and back.

    ONNX Runtime removes such casts, at every level of optimisation, and forgets the branches and loops that read their
    result from around them, as those of the bodies do: 1.32 then fails with ``Missing Input``.
    """
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        source = _before_widening(node) if node.op_type == "Cast" and node.domain == "" else None
        if source is None:
            continue
        for user, index in tuple(node.outputs[0].uses()):
            user.replace_input_with(index, source)
        value = node.outputs[0]
        while value is not source and not value.uses() and not value.is_graph_output():
            cast, value = value.producer(), value.producer().inputs[0]
            cast.graph.remove(cast, safe=True)


def _before_widening(cast: ir.Node) -> ir.Value | None:
    """The value that ``cast`` gives back, after casts that lost nothing of it; None if there is none."""
    value, dtype = cast.inputs[0], cast.outputs[0].dtype
    while value.dtype != dtype:
        node = value.producer()
        if node is None or node.op_type != "Cast" or node.domain != "":
            return None
        narrow = node.inputs[0].dtype
        if narrow is None or value.dtype.name not in WIDER.get(narrow.name, ()):
            return None
        value = node.inputs[0]
    return value if value is not cast.inputs[0] else None


def _distinct_names(model: ir.Model) -> None:
    """New values are named a graph at a time; subgraphs must not use a name of the graph around them."""
    import onnx_ir as ir

    taken = {value.name for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    fixed, count = {*model.graph.outputs}, 0
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value in fixed:
                continue
            while value.name is None or value.name in taken:
                count += 1
                value.name = f"value_{count}"
            taken.add(value.name)
