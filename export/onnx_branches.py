"""Prefill and decode as the two branches of one graph, over the same weights.

The prefill alone would do for both, but attention over blocks of queries costs a decode step hundreds of times what
one query costs. So the graph asks for the length: ``If (T == 1)`` takes the step's nodes, else the prefill's. Weights
belong to the outer graph, once.
"""

from __future__ import annotations

import numpy
import onnx_ir as ir


def join(prefill: ir.Model, step: ir.Model) -> ir.Model:
    """One model of two with the same states: ``input_ids [batch, T]`` as the prefill takes them, ``[batch]`` the step.

    The first input is ``input_ids``, the first output the logits ``[batch, T, vocabulary]`` and
    ``[batch, vocabulary]``; the others are the states, of one shape in both. Both models are taken apart.
    """
    inputs = [ir.Value(name=x.name, type=x.type, shape=x.shape) for x in prefill.graph.inputs]
    outer = ir.Graph(inputs, [], nodes=[], opset_imports=dict(prefill.opset_imports), name="prefill_or_step")
    _one_token(step.graph, prefill.graph.inputs[0].shape[1])
    weights: dict[tuple, list[ir.Value]] = {}
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


def _one_token(graph: ir.Graph, tokens: ir.SymbolicDim | int) -> None:
    """``input_ids [batch, T]`` in, of which the first is taken, and ``logits [batch, T, vocabulary]`` out.

    T is 1 where the branch is taken. But TensorRT works out the shapes of both branches at any length, and must find
    the same ones.
    """
    ids, logits = graph.inputs[0], graph.outputs[0]
    axis, zero = (ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [n])]) for n in (1, 0))
    first = ir.Node("", "Slice", [ids, zero.outputs[0], axis.outputs[0], axis.outputs[0]], name="first_token")
    flat = ir.Node("", "Squeeze", [first.outputs[0], axis.outputs[0]], name="one_token")
    flat.outputs[0].dtype, flat.outputs[0].shape = ids.dtype, ids.shape
    for node, index in list(ids.uses()):
        if node is not first:
            node.replace_input_with(index, flat.outputs[0])
    graph.insert_before(graph[0], [axis, zero, first, flat])
    long = ir.Node("", "Unsqueeze", [logits, axis.outputs[0]], name="one_token_logits")
    long.outputs[0].dtype, long.outputs[0].shape = logits.dtype, ir.Shape([logits.shape[0], 1, logits.shape[1]])
    length = ir.Node("", "Shape", [ids], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    shape = ir.Node("", "Concat", [axis.outputs[0], length.outputs[0], axis.outputs[0]], [ir.AttrInt64("axis", 0)])
    every = ir.Node("", "Expand", [long.outputs[0], shape.outputs[0]], name="every_token_logits")
    every.outputs[0].dtype, every.outputs[0].shape = logits.dtype, ir.Shape([logits.shape[0], tokens, logits.shape[1]])
    every.outputs[0].name = logits.name
    logits.name = f"{logits.name}.flat"
    graph.extend([long, length, shape, every])
    graph.outputs[0] = every.outputs[0]


def _move_weights(graph: ir.Graph, outer: ir.Graph, weights: dict[tuple, list[ir.Value]], prefix: str) -> None:
    """To the outer graph, unless the same numbers are there.

    torch's exporter transposes weights in advance and gives the results numbers for names, other ones in each graph: so
    numbers are compared, not names.
    """
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        array = value.const_value.numpy()
        key = (value.const_value.dtype, array.shape, array.flat[:64].tobytes())  # few are left to be compared whole
        same = [other for other in weights.get(key, ()) if numpy.array_equal(other.const_value.numpy(), array)]
        if same:
            value.replace_all_uses_with(same[0], replace_graph_outputs=True)
            continue
        value.name = f"{prefix}.{name}" if name in outer.initializers else name
        outer.initializers[value.name] = value
        weights.setdefault(key, []).append(value)


def _rename(graph: ir.Graph, prefix: str) -> None:
    """No name occurs in both branches: some readers take a file's names for one space."""
    for index, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
        node.name = f"{prefix}.{node.name or index}"
        for number, value in enumerate(node.outputs):
            value.name = f"{prefix}.{value.name or f'{index}.{number}'}"
