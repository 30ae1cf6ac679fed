"""What an export says about itself: ``manifest.json``.

Shapes are lists of integers and of expressions in the names listed under ``dynamic``. Tensors are contiguous.
"""

from __future__ import annotations

import hashlib
import operator
import platform
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import sympy
import torch
from gdn_ops.export.program import Plan, arguments, by_name, flatten_state, is_language_model, path_name
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

import gdn_ops

FORMAT, ONNX_FORMAT, TENSORRT_FORMAT, FORMAT_VERSION = "gdn_ops.aoti", "gdn_ops.onnx", "gdn_ops.tensorrt", 1
FORMATS = (FORMAT, ONNX_FORMAT, TENSORRT_FORMAT)


def operators(program: ExportedProgram) -> list[str]:
    """Names of the operators that the program calls, subgraphs included, sorted."""
    names = set()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            targets = (node.target for node in module.graph.nodes if node.op == "call_function")
            names |= {target.name() for target in targets if isinstance(target, torch._ops.OpOverload)}
    return sorted(names)


def user_tensors(program: ExportedProgram) -> list[torch.Tensor]:
    """The program's inputs as traced (fake tensors with symbolic shapes), in order."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT}
    nodes = (node for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
    return [node.meta["val"] for node in nodes if torch.is_tensor(node.meta.get("val"))]


def _walk(spec: Any, value: Any) -> list[Any]:
    """The ``dynamic_shapes`` entry of each tensor of ``value``, in pytree order; None where there is none."""
    if torch.is_tensor(value):
        return [spec]
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    elif type(value) in pytree.SUPPORTED_NODES:  # of a class of the caller's, torch.export takes a list
        children = enumerate(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    else:
        children = ()
    found = []
    for key, child in children:
        inner = None
        if isinstance(spec, dict):
            inner = spec.get(key)
        elif isinstance(spec, (list, tuple)) and isinstance(key, int) and key < len(spec):
            inner = spec[key]
        found += _walk(inner, child)
    return found


def dimension_names(item: Plan, program: ExportedProgram) -> dict[sympy.Symbol, str]:
    """A name for each symbol of the input shapes: the ``Dim``'s own, else the first of ``d0``, ``d1``, ... that is
    no ``Dim``'s, from its place among them on."""
    spec, values = item.dynamic_shapes, arguments(item)
    if isinstance(spec, torch.export.ShapesCollection):
        spec = spec.dynamic_shapes(item.module, item.args, item.kwargs)
    if isinstance(spec, (list, tuple)):
        values = list(values.values())
    own: dict[sympy.Symbol, str | None] = {}
    for tensor, dims in zip(user_tensors(program), _walk(spec, values), strict=True):
        for axis, size in enumerate(tensor.shape):
            free = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
            dim = dims.get(axis) if isinstance(dims, dict) else dims[axis] if isinstance(dims, (list, tuple)) else None
            dim = getattr(dim, "root", dim)  # of 2 * n, n
            for symbol in sorted(free, key=str):
                named = len(free) == 1 and hasattr(dim, "__name__")
                own[symbol] = own.get(symbol) or (dim.__name__ if named else None)
    names, taken = {}, set(own.values())
    for place, (expression, name) in enumerate(own.items()):
        if name is None:
            name = next(free for i in count(place) if (free := f"d{i}") not in taken)
            taken.add(name)
        names[expression] = name
    return names


def _tensor(name: str, tensor: torch.Tensor, names: dict[sympy.Symbol, str], role: str) -> dict[str, Any]:
    shape = []
    for size in tensor.shape:
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        expression = expression.subs({symbol: sympy.Symbol(new) for symbol, new in names.items()})
        shape.append(int(expression) if expression.is_Integer else str(expression))
    return {"name": name, "role": role, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def _output_names(program: ExportedProgram, item: Plan) -> list[str]:
    count = program.call_spec.out_spec.num_leaves
    if item.states:
        return ["logits", *item.states]
    tree = pytree.tree_unflatten(list(range(count)), program.call_spec.out_spec)
    return [path_name(path) or "output" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _results(item: Plan, program: ExportedProgram) -> list[tuple[str, Any]]:
    """What the program returns, by name: fake tensors, symbolic integers and constants."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results = [getattr(node, "meta", {}).get("val", node) for node in output.args[0]]
    return list(zip(_output_names(program, item), results[len(results) - program.call_spec.out_spec.num_leaves :]))


def refuse_results(item: Plan, program: ExportedProgram, *kinds: type) -> None:
    """ValueError unless every result is a tensor, None, or of one of ``kinds``, which the artifact can give back."""
    results = _results(item, program)
    if not kinds and not any(isinstance(result, torch.Tensor) for _, result in results):
        raise ValueError("model: expected tensors as results, got none")
    for name, result in results:
        if result is not None and not isinstance(result, (torch.Tensor, *kinds)):
            raise ValueError(f"model: expected tensors as results, got {result!r} for {name}")


def _constants(item: Plan, program: ExportedProgram) -> dict[str, Any]:
    """What the example has besides tensors, by name: it is in the program, which has no input for it. What JSON has no
    form for is there by its ``repr``."""
    inputs = [x.arg for x in program.graph_signature.input_specs if x.kind == InputKind.USER_INPUT]
    named = zip(by_name(arguments(item)), inputs)
    fixed = {name: x.value for name, x in named if isinstance(x, ConstantArgument)}
    return {name: x if isinstance(x, (bool, int, float, str, type(None))) else repr(x) for name, x in fixed.items()}


def writes(item: Plan, program: ExportedProgram) -> dict[str, str]:
    """The inputs that the program writes in place, and the parameters and buffers, by the kind of each."""
    leaves = iter(by_name(arguments(item)))
    names, kinds = {}, {}
    for x in program.graph_signature.input_specs:
        names[x.arg.name] = next(leaves) if x.kind == InputKind.USER_INPUT else x.target
        kinds[x.arg.name] = "input" if x.kind == InputKind.USER_INPUT else x.kind.name.lower()
    written = (_origin(x) for node in program.graph.nodes for x in _written(node))
    return {names[x.name]: kinds[x.name] for x in written if x.name in names}


def _written(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """What the node writes in place."""
    for place, argument in enumerate(_schema(node).arguments if _schema(node) else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            x = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, torch.fx.Node))


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """What the node is a view of."""
    storage = _storage(node)
    while node.target is operator.getitem or (_schema(node) and any(x.alias_info for x in _schema(node).returns)):
        before = node.args[0]
        if _storage(before) not in (storage, None):  # None: several tensors. Another: such as ``x.float()`` of a half
            return node
        node = before
    return node


def _storage(node: torch.fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if torch.is_tensor(value) else None


def _schema(node: torch.fx.Node) -> Any:
    """Of the operator that the node calls; None for what is no operator."""
    return getattr(node.target, "_schema", None)


def refuse_writes(item: Plan, program: ExportedProgram) -> None:
    """ValueError if the program writes into what it was given or has, which no file of pure functions can."""
    for name, kind in writes(item, program).items():
        raise ValueError(
            f"model: expected a forward that writes nothing in place, got one that writes the {kind} {name}"
        )


def describe_program(item: Plan, program: ExportedProgram) -> dict[str, Any]:
    """Inputs, outputs, dynamic ranges, states and operators of one program; the constants of its example, and which
    inputs it writes."""
    names = dimension_names(item, program)
    ranges = {}
    for symbol, name in names.items():
        bounds = program.range_constraints[symbol]
        upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
        ranges[name] = {"min": int(bounds.lower), "max": upper}

    def role(name: str) -> str:
        return "state" if name in item.states else "tensor"

    return {
        "operators": operators(program),
        "dynamic": ranges,
        "inputs": [_tensor(n, t, names, role(n)) for n, t in zip(item.inputs, user_tensors(program))],
        "parameters": list(arguments(item)) if item.args else [],
        "arguments": list(by_name(arguments(item))),
        "constants": _constants(item, program),
        "writes": sorted(name for name, kind in writes(item, program).items() if kind == "input"),
        "outputs": [_tensor(n, t, names, role(n)) for n, t in _results(item, program) if torch.is_tensor(t)],
        "states": {name: name for name in item.states},
    }


def _initial_state(model: torch.nn.Module) -> dict[str, float]:
    """The constant each state starts from."""
    fills = {}
    for name, tensor in flatten_state(model.init_state(1)).items():
        low, high = (x.item() for x in tensor.aminmax()) if tensor.numel() else (0, 0)
        if low != high:
            raise ValueError(f"init_state: expected {name} to start from one constant, got {low} to {high}")
        fills[name] = low
    return fills


def describe(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    programs: dict[str, Any],
    target: str = "aoti",
    **versions: str,
) -> dict[str, Any]:
    """The manifest; ``programs`` are entries of :func:`describe_program` with ``file``, ``size`` and ``sha256``.
    ``versions`` are those of further packages that the export was made with."""
    machine: dict[str, Any] = {"architecture": platform.machine()}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        machine |= {"device": torch.cuda.get_device_name(device), "capability": list(capability)}
    else:
        machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    language_model = is_language_model(model)
    return {
        "format": {"aoti": FORMAT, "tensorrt": TENSORRT_FORMAT}.get(target, ONNX_FORMAT),
        "format_version": FORMAT_VERSION,
        "target": target,
        "model": type(model).__name__,
        "config": model.config.to_dict() if language_model else None,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine,
        "versions": {"gdn_ops": gdn_ops.__version__, "torch": torch.__version__, **versions},
        "layout": "contiguous",
        "initial_state": _initial_state(model) if language_model else {},
        "programs": programs,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and digest, as :func:`gdn_ops.export.verify` compares them."""
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
