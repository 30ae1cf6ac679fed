"""Prefill and decode as the two branches of one graph, over the same weights.

The prefill alone would do for both, but attention over blocks of queries costs a decode step hundreds of times what
one query costs. So the graph asks for the length: ``If (T == 1)`` takes the step's nodes, else the prefill's. Weights
belong to the outer graph, once.
"""

from __future__ import annotations

import onnx_ir as ir
from gdn_ops.export.onnx_graph import FOLDED


def join(prefill: ir.Model, step: ir.Model) -> ir.Model:
    """One model of two with the same inputs and outputs, of which ``input_ids [batch, T]`` is the first. Both are taken
    apart."""
    inputs = [ir.Value(name=x.name, type=x.type, shape=x.shape) for x in prefill.graph.inputs]
    outer = ir.Graph(inputs, [], nodes=[], opset_imports=dict(prefill.opset_imports), name="prefill_or_step")
    weights: dict[tuple, ir.Value] = {}
    for prefix, graph in (("prefill", prefill.graph), ("step", step.graph)):
        for own, given in zip(graph.inputs, inputs):
            own.replace_all_uses_with(given, replace_graph_outputs=True)
        graph.inputs.clear()
        _move_weights(graph, outer, weights, prefix)
        _rename(graph, prefix)
        graph.name = prefix
    tape = ir.tape.Tape(outer)
    length = tape.op("Shape", [inputs[0]], {"start": 1, "end": 2})
    is_token = tape.op("Squeeze", [tape.op("Equal", [length, tape.op("Constant", [], {"value_ints": [1]})])])
    branches = {"then_branch": step.graph, "else_branch": prefill.graph}
    values = tape.op_multi_out("If", [is_token], branches, num_outputs=len(prefill.graph.outputs))
    for value, like in zip(values, prefill.graph.outputs):
        value.name, value.dtype, value.shape = like.name.removeprefix("prefill."), like.dtype, like.shape
    outer.outputs.extend(values)
    return ir.Model(outer, ir_version=prefill.ir_version, functions=list(prefill.functions.values()))


def _move_weights(graph: ir.Graph, outer: ir.Graph, weights: dict[tuple, ir.Value], prefix: str) -> None:
    """To the outer graph, unless the same tensor, or for a small one the same numbers, is there."""
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        tensor = value.const_value
        small = tensor.size <= FOLDED  # made on the spot, in each branch
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes()) if small else (id(tensor),)
        if key in weights:
            value.replace_all_uses_with(weights[key], replace_graph_outputs=True)
            continue
        value.name = f"{prefix}.{name}" if name in outer.initializers else name
        outer.initializers[value.name] = weights[key] = value


def _rename(graph: ir.Graph, prefix: str) -> None:
    """No name occurs in both branches: some readers take a file's names for one space."""
    for index, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
        node.name = f"{prefix}.{node.name or index}"
        for number, value in enumerate(node.outputs):
            value.name = f"{prefix}.{value.name or f'{index}.{number}'}"
