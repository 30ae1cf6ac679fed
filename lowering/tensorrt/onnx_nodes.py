"""A ``portable`` ONNX file with TensorRT's plugins in the place of its local functions.

TensorRT's parser takes an operator that it does not know for a plugin of that name, in the namespace and version that
the node's attributes give. In a ``portable`` file queries, keys and values are cast to fp32 for the function's body;
the kernels take them as they are, so the casts go, and the outputs are cast up again for what comes after.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gdn_ops.lowering.onnx.function import DOMAIN
from gdn_ops.lowering.onnx.translation import CONV, LINEAR, RULE
from gdn_ops.lowering.tensorrt.declaration import CHUNK_RULE, NAMESPACE, RECURRENT
from gdn_ops.lowering.tensorrt.declaration import CONV as CONV_KERNEL

if TYPE_CHECKING:
    import onnx_ir as ir
    from gdn_ops.lowering.tensorrt.declaration import PluginKernel


def with_plugins(portable: Path, path: Path, external_data: str | None = None) -> dict[str, int]:
    """Writes ``portable`` with plugins to ``path``; returns how many of each it has.

    A node of one token is the recurrent kernel's, any other the chunkwise one's. Gated linear attention, which has no
    plugin, stays a function. ``external_data`` is the name of a file beside ``path`` for the weights.
    """
    import onnx_ir as ir

    model = ir.load(portable)
    counts: dict[str, int] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain != DOMAIN or node.op_type == LINEAR:
            continue
        kernel, widened = _kernel_of(node)
        _replace(node, kernel, widened)
        counts[kernel.id] = counts.get(kernel.id, 0) + 1
    for identifier in [x for x in model.functions if x[1] != LINEAR]:
        del model.functions[identifier]
    if not model.functions:
        model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[NAMESPACE] = 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.save(model, path, external_data=external_data)
    return dict(sorted(counts.items()))


def _kernel_of(node: ir.Node) -> tuple[PluginKernel, range]:
    """The kernel, and which inputs it takes in 16 bits, all or none of the first group."""
    if node.op_type == CONV:
        return CONV_KERNEL, range(4)
    if node.op_type != RULE:
        raise ValueError(f"model: expected {RULE} or {CONV} in the domain {DOMAIN}, got {node.op_type}")
    shape = node.inputs[0].shape
    return (RECURRENT if shape is not None and shape[1] == 1 else CHUNK_RULE), range(3)


def _replace(node: ir.Node, kernel: PluginKernel, widened: range) -> None:
    import onnx_ir as ir

    float_, inputs = ir.DataType.FLOAT, list(node.inputs)
    narrow = [_before_cast(x) for x in inputs]
    low = narrow[0].dtype
    if low != float_ and all(narrow[i].dtype == low for i in widened):
        inputs = [narrow[i] if i in widened else x for i, x in enumerate(inputs)]
    else:
        low = float_
    attributes = [ir.AttrString("plugin_namespace", NAMESPACE), ir.AttrString("plugin_version", "1")]
    attributes += [node.attributes[name] for name in kernel.attributes]
    plugin = ir.Node(NAMESPACE, kernel.name, inputs, attributes, num_outputs=len(kernel.outputs), name=node.name)
    nodes, values = [plugin], []
    for argument, made, old in zip(kernel.outputs, plugin.outputs, node.outputs):
        made.dtype, made.shape = (low if argument.free else float_), old.shape
        if made.dtype == float_:
            values.append(made)
            continue
        cast = ir.Node("", "Cast", [made], [ir.AttrInt64("to", int(float_))])
        cast.outputs[0].dtype, cast.outputs[0].shape = float_, old.shape
        nodes.append(cast)
        values.append(cast.outputs[0])
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, list(node.outputs), values)


def _before_cast(value: ir.Value) -> ir.Value:
    """What was widened to fp32, or the value itself."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Cast" or node.inputs[0].dtype is None:
        return value
    narrower = node.inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    return node.inputs[0] if narrower else value
