"""A traced program as a graph of ONNX nodes, each operator of this package one node of the domain ``gdn_ops``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sympy
import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export.program import Plan
from gdn_ops.lowering.onnx import translating
from gdn_ops.lowering.onnx.stamps import raise_opset
from gdn_ops.lowering.onnx.translation import unsupported_operators
from torch.export import ExportedProgram

if TYPE_CHECKING:
    import onnx_ir as ir

TRACED_OPSET = 18
# Numbers in a constant up to which its transposition is computed on the spot.
FOLDED = 1024


def module(program_name: str, item: Plan, program: ExportedProgram, target: str) -> tuple[ir.Model, dict[str, Any]]:
    """The graph of a program and what the manifest says of it, names of both alike."""
    manifests.refuse_results(item, program)
    entry = manifests.describe_program(item, program)
    model = translate(program_name, item, program, entry["operators"])
    simplify(model, target)
    name(model, item, program, entry)
    return model, entry


def translate(name: str, item: Plan, program: ExportedProgram, operators: list[str]) -> ir.Model:
    """The nodes as torch's exporter gives them; ``operators`` are those that the program calls, ``name`` is its own."""
    reasons = unsupported_operators(operators)
    if reasons:
        listed = "; ".join(f"{operator}: {reason}" for operator, reason in reasons.items())
        raise ValueError(f"model: program {name!r} cannot go into an ONNX file: {listed}")
    manifests.refuse_writes(item, program)
    with translating() as table, _quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=TRACED_OPSET,
                custom_translation_table=table,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ValueError(f"model: torch.onnx.export: {cause}") from error
    model = exported.model
    if model.opset_imports.get("") != TRACED_OPSET:
        raise RuntimeError(f"torch.onnx.export: expected opset {TRACED_OPSET}, got {dict(model.opset_imports)}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and on torch's own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def simplify(model: ir.Model, target: str) -> None:
    """What the exporter's ``optimize`` does, to a graph that is small already: its patterns take a time that grows with
    the square of the nodes, of which two thirds are constants and repetitions (12 layers: 2 s instead of 10). For
    ``onnx27`` the result is raised to that opset."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model, should_fold=_small)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    optimizer.optimize_ir(model, should_fold=_small)
    if target == "onnx27":
        raise_opset(model, 27)


def share(model: ir.Model) -> None:
    """Computes once what is alike in parts that were simplified on their own, and folds what became constant."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.DeduplicateInitializersPass()(model)
    optimizer.fold_constants(model, should_fold=_small)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _small(node: ir.Node) -> bool | None:
    """Whether a node may be folded: a large weight's transposition is left to :func:`transpose_weights`."""
    constant = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] is not None else None
    return None if constant is None or constant.size <= FOLDED else False


def transpose_weights(model: ir.Model) -> None:
    """Stores transposed what the graph would transpose at each call; each weight once for all the nodes that do.

    The numbers are moved when they are written, and lie in order then: NumPy writes a transposed view number by number,
    which takes ten seconds a gigabyte.
    """
    import onnx_ir as ir

    graph, moved = model.graph, {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        weight = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or node.domain != "" or weight is None or not weight.is_initializer():
            continue
        if node.outputs[0].is_graph_output():
            continue
        perm = node.attributes.get("perm")
        axes = tuple(reversed(range(len(weight.shape)))) if perm is None else tuple(perm.as_ints())
        if (weight, axes) not in moved:
            moved[weight, axes] = _transposed(weight, axes, graph)
        node.outputs[0].replace_all_uses_with(moved[weight, axes])
        node.graph.remove(node, safe=True)
    for weight, _ in moved:
        if not weight.uses() and not weight.is_graph_output() and weight.name in graph.initializers:
            del graph.initializers[weight.name]


def _transposed(weight: ir.Value, axes: tuple[int, ...], graph: ir.Graph) -> ir.Value:
    import numpy
    import onnx_ir as ir

    source = weight.const_value
    shape = ir.Shape([source.shape[axis] for axis in axes])

    def move() -> ir.TensorProtocol:
        raw = getattr(source, "raw", None)
        if isinstance(raw, torch.Tensor):
            return ir.tensor_adapters.TorchTensor(raw.detach().permute(axes).contiguous())
        return ir.Tensor(numpy.ascontiguousarray(source.numpy().transpose(axes)), dtype=source.dtype)

    name = f"{weight.name}.transposed"
    while name in graph.initializers:
        name += "'"
    tensor = ir.LazyTensor(move, dtype=source.dtype, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(source.dtype), shape=shape, const_value=tensor)
    graph.initializers[name] = value
    return value


def name(model: ir.Model, item: Plan, program: ExportedProgram, entry: dict[str, Any]) -> None:
    """Gives inputs, outputs and dynamic sizes the manifest's names, and the manifest those that had to differ."""
    graph = model.graph
    if len(graph.inputs) != len(entry["inputs"]) or len(graph.outputs) != len(entry["outputs"]):
        raise ValueError(
            f"model: expected an ONNX graph of {len(entry['inputs'])} inputs and {len(entry['outputs'])} outputs, got "
            f"{len(graph.inputs)} and {len(graph.outputs)}: leave out arguments and results that are no tensors"
        )
    own_outputs(model)
    taken = {x["name"] for x in entry["inputs"]} | set(graph.initializers)
    for described in entry["outputs"]:
        if described["name"] in taken:
            described["name"] = f"present.{described['name']}"
        taken.add(described["name"])
    for node in graph:  # an inner value may already have the name that an output or input is to have
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}.inner"
    for value, described in zip((*graph.inputs, *graph.outputs), (*entry["inputs"], *entry["outputs"])):
        value.name = described["name"]
    names = {str(symbol): name for symbol, name in manifests.dimension_names(item, program).items()}
    rename_dimensions(model, names)


def own_outputs(model: ir.Model) -> None:
    """An output that is an input, a weight or another output gets a node of its own, so that it can have a name."""
    import onnx_ir as ir

    graph, seen = model.graph, set()
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(value)


def rename_dimensions(model: ir.Model, names: dict[str, str]) -> None:
    """Dynamic sizes by the names of the manifest; a size of an inner value that is no plain name is left open."""
    import onnx_ir as ir

    symbols = {old: sympy.Symbol(new) for old, new in names.items()}
    outer = {*model.graph.inputs, *model.graph.outputs}

    def renamed(size: Any, keep: bool) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        if size.value in names:
            return names[size.value]
        return str(sympy.sympify(size.value, locals=symbols)) if keep else None

    values = {value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs}
    for value in values | outer:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size, value in outer) for size in value.shape])
