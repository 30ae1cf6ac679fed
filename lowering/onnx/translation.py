"""Brings the operators through ``torch.onnx.export``, each as one node of the domain ``gdn_ops``.

torch's exporter, asked for an operator that its opset lacks, warns and returns an invalid model; asked for one of a
registered domain, it keeps it whole. So the nodes below are registered while the exporter runs, and what they
become is decided afterwards (``targets``).

    o, final_state = gdn_ops::GatedDeltaRule <scale> (q, k, v, g, beta, initial_state)
    o, final_state = gdn_ops::GatedLinearAttention <scale> (q, k, v, g, initial_state)
    y, final_state = gdn_ops::CausalConv1d <silu> (x, weight, bias, initial_state)

Layouts are those of ``gdn_ops.reference``; no input is optional: an absent state or bias arrives as zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from gdn_ops.lowering.onnx.function import DOMAIN

RULE, LINEAR, CONV = "GatedDeltaRule", "GatedLinearAttention", "CausalConv1d"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_SIGNATURES = {
    RULE: (
        {"q": "T", "k": "T", "v": "T", "g": "G", "beta": "W", "initial_state": "S"},
        {"o": "T", "final_state": "S"},
        ("scale", "FLOAT"),
    ),
    LINEAR: (
        {"q": "T", "k": "T", "v": "T", "g": "G", "initial_state": "S"},
        {"o": "T", "final_state": "S"},
        ("scale", "FLOAT"),
    ),
    CONV: (
        {"x": "T", "weight": "T", "bias": "T", "initial_state": "T"},
        {"y": "T", "final_state": "T"},
        ("silu", "INT"),
    ),
}
_PACKED = (
    "cu_seqlens: packed sequences have no form in ONNX (neither LinearAttention nor a loop of equal chunks takes their "
    "bounds): export a model that takes rows, and run sequences of unequal length as rows of their own"
)


def unsupported_operators(operators: list[str]) -> dict[str, str]:
    """The ``gdn::`` operators among ``operators`` that have no form in ONNX, and why."""
    rules = ("gated_delta_rule", "gated_linear_attention")
    known = (*(f"gdn::{form}_{rule}" for rule in rules for form in ("chunk", "recurrent")), "gdn::causal_conv1d")
    reasons = {}
    for name in operators:
        plain = name.removesuffix(".default")
        if not name.startswith("gdn::") or plain in known:
            continue
        if plain.endswith("_"):
            reasons[name] = "it writes into its argument, which no ONNX node can: use the function that returns a state"
        else:
            reasons[name] = f"it has no ONNX form (those that have: {', '.join(known)})"
    return reasons


def _schemas() -> list:
    from onnx.defs import OpSchema

    schemas = []
    for name, (inputs, outputs, (attribute, kind)) in _SIGNATURES.items():
        before, after = ([OpSchema.FormalParameter(x, t) for x, t in group.items()] for group in (inputs, outputs))
        types = [(t, _FLOATS, "") for t in dict.fromkeys((*inputs.values(), *outputs.values()))]
        attributes = [OpSchema.Attribute(attribute, getattr(OpSchema.AttrType, kind), "", required=True)]
        fields = {"inputs": before, "outputs": after, "type_constraints": types, "attributes": attributes}
        schemas.append(OpSchema(name, DOMAIN, 1, **fields))
    return schemas


def _table() -> dict[Callable, Callable]:
    from onnxscript import opset18 as op
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)

    def empty(state):
        """What an operator returns that was asked for no state: one without rows."""
        zero = op.Constant(value_ints=[0])
        return op.Slice(state, zero, zero, zero)

    def start(q, v, initial_state, cu_seqlens):
        if cu_seqlens is not None:
            raise ValueError(_PACKED)
        if initial_state is not None:
            return initial_state
        sizes = op.Constant(value_ints=[v.shape[2], q.shape[3], v.shape[3]])
        shape = op.Concat(op.Shape(v, start=0, end=1), sizes, axis=0)
        return op.Expand(op.Constant(value_float=0.0), shape)

    def rule(q, k, v, g, beta, initial_state, cu_seqlens, scale: float, output_final_state: bool):
        before = start(q, v, initial_state, cu_seqlens)
        o, state = domain.GatedDeltaRule(q, k, v, g, beta, before, scale=scale)
        return o, state if output_final_state else empty(state)

    def linear(q, k, v, g, initial_state, cu_seqlens, scale: float, output_final_state: bool):
        before = start(q, v, initial_state, cu_seqlens)
        o, state = domain.GatedLinearAttention(q, k, v, g, before, scale=scale)
        return o, state if output_final_state else empty(state)

    def conv(x, weight, bias, initial_state, cu_seqlens, silu: bool, output_final_state: bool):
        if cu_seqlens is not None:
            raise ValueError(_PACKED)
        D, W = weight.shape
        zero = op.CastLike(op.Constant(value_float=0.0), x)
        if bias is None:
            bias = op.Expand(zero, op.Constant(value_ints=[D]))
        if initial_state is None:
            shape = op.Concat(op.Shape(x, start=0, end=1), op.Constant(value_ints=[D, W - 1]), axis=0)
            initial_state = op.Expand(zero, shape)
        y, state = domain.CausalConv1d(x, weight, bias, initial_state, silu=int(silu))
        return y, state if output_final_state else empty(state)

    return {
        torch.ops.gdn.chunk_gated_delta_rule.default: rule,
        torch.ops.gdn.recurrent_gated_delta_rule.default: rule,
        torch.ops.gdn.chunk_gated_linear_attention.default: linear,
        torch.ops.gdn.recurrent_gated_linear_attention.default: linear,
        torch.ops.gdn.causal_conv1d.default: conv,
    }


@contextlib.contextmanager
def translating() -> Iterator[dict[Callable, Callable]]:
    """Inside it, torch's exporter keeps the operators whole; gives its ``custom_translation_table``.

    Example::

        >>> with translating() as table:  # doctest: +SKIP
        ...     torch.onnx.export(program, dynamo=True, opset_version=18, custom_translation_table=table)
    """
    import onnx.defs

    schemas = _schemas()
    for schema in schemas:
        onnx.defs.register_schema(schema)
    try:
        yield _table()
    finally:
        for schema in schemas:
            onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)
