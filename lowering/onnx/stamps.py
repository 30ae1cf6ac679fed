"""Opsets: raising a model's, and checking that what is stamped is what is in the file.

A file may say opset 18 and hold a node of opset 27; torch's exporter returns such a one with a warning, and the
reference evaluator runs it. So every node of the finished file is looked up in the opset that the file imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

CONVERTED = 25
# Between opset 25 and 27 it only takes more types.
WIDENED = ("Range",)


def raise_opset(model: ir.Model, opset: int) -> None:
    """Brings ``model`` from opset 18 up to ``opset``, in place.

    onnxscript converts up to opset 25; beyond it the stamp alone changes, if every node means the same in both. A node
    that only the new opset has, as ``lower`` puts into a model for ``onnx27``, means what it says there.

    Raises:
        ValueError: a node that means something else in the new opset.
    """
    import onnx.defs
    import onnx_ir as ir
    from onnxscript import version_converter

    here = model.opset_imports[""]
    if here < min(opset, CONVERTED):
        version_converter.convert_version(model, min(opset, CONVERTED))
        here = model.opset_imports[""]
        if here != min(opset, CONVERTED):
            raise ValueError(f"model: could not be converted to opset {min(opset, CONVERTED)}, it is still {here}")
    if opset > onnx.defs.onnx_opset_version():
        raise ValueError(
            f"target: expected an onnx package that knows opset {opset}, got one up to "
            f"{onnx.defs.onnx_opset_version()}: pip install -U onnx"
        )
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "":
            continue
        new = onnx.defs.get_schema(node.op_type, opset).since_version
        old = onnx.defs.get_schema(node.op_type, here).since_version if onnx.defs.has(node.op_type, here) else new
        if old != new and node.op_type not in WIDENED:
            raise ValueError(f"model: {node.op_type} changed between opset {here} and {opset}; use target 'portable'")
        node.version = None
    model.opset_imports[""] = opset


def check_stamps(model: onnx.ModelProto, opset: int) -> dict[str, int]:
    """The opsets that ``model`` imports, by domain (``ai.onnx`` for the standard's).

    Raises:
        ValueError: the standard's opset is not ``opset``, or a node of the graph, of a subgraph or of a function is in
            no opset that is imported there.
    """
    imports = {x.domain: x.version for x in model.opset_import}
    if imports.get("") != opset:
        raise ValueError(f"model: expected opset {opset}, got {imports.get('')}")
    functions = {(function.domain, function.name) for function in model.functions}
    _check_nodes(model.graph.node, imports, functions, "graph")
    for function in model.functions:
        own = {x.domain: x.version for x in function.opset_import}
        _check_nodes(function.node, own, functions, f"function {function.domain}::{function.name}")
    return {domain or "ai.onnx": version for domain, version in imports.items()}


def _check_nodes(nodes, imports: dict[str, int], functions: set[tuple[str, str]], where: str) -> None:
    import onnx.defs

    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _check_nodes(graph.node, imports, functions, where)
        if (node.domain, node.op_type) in functions:
            continue
        if node.domain not in imports:
            raise ValueError(f"{where}: {node.op_type} is of the domain {node.domain!r}, which is not imported")
        if node.domain != "":
            raise ValueError(f"{where}: {node.domain}::{node.op_type} has neither a schema nor a body in the file")
        try:
            schema = onnx.defs.get_schema(node.op_type, imports[""], "")
        except onnx.defs.SchemaError:
            raise ValueError(f"{where}: {node.op_type} is in no opset up to {imports['']}, which is stamped") from None
        if schema.deprecated:
            raise ValueError(f"{where}: {node.op_type} is deprecated in opset {imports['']}, which is stamped")
