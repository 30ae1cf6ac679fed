"""A model as one ONNX file that gives eager's numbers, in one of three dialects.

``portable`` runs wherever ONNX opset 18 does: each operator is a local function, a chunkwise loop with a branch for
one token. ``ort`` has ONNX Runtime's fused operators, with the same functions as bodies for other runtimes. ``onnx27``
has the operators that the standard got with opset 27. The table in ``gdn_ops.lowering.onnx`` says which node stands for
what.

A :class:`gdn_ops.models.HybridLM` becomes one graph for prefill and decode: ``input_ids [batch, T]`` (both from 1) and
every state by its dotted name in, ``logits [batch, T, vocabulary]`` and ``present.<state>`` out. In an ONNX graph no
two values share a name, hence the prefix; the manifest's ``states`` says which output feeds which input. ONNX Runtime
alone runs it::

    import json, numpy, onnxruntime
    manifest, batch = json.load(open("out/manifest.json")), 2
    program = manifest["programs"]["prefill"]
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    states = [x for x in program["inputs"] if x["role"] == "state"]
    shapes = {x["name"]: [batch if n == "batch" else n for n in x["shape"]] for x in states}
    start, dtypes = manifest["initial_state"], {x["name"]: x["dtype"] for x in states}
    state = {name: numpy.full(shape, start[name], dtypes[name]) for name, shape in shapes.items()}
    names = ["logits", *program["states"].values()]
    logits, *state = session.run(names, {"input_ids": numpy.zeros((batch, 70), "int64"), **state})
    state = dict(zip(program["states"], state))

An export is a folder: ``model.onnx``, ``model.onnx.data`` (the weights, if they are large), ``manifest.json`` and
``parity.json``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export import onnx_graph, onnx_proof, parity
from gdn_ops.export.destination import check_destination, replacing
from gdn_ops.export.program import Plan, device_of, export_plan, inference, plan
from gdn_ops.export.runner import read_manifest
from gdn_ops.lowering.onnx import TARGETS, lower
from gdn_ops.lowering.onnx.targets import Lowered
from torch import nn
from torch.export import ExportedProgram

from gdn_ops.files import show

FILE, DATA = "model.onnx", "model.onnx.data"
# A file of more than 2 GiB is no valid protobuf; far below that, weights of their own are still handier.
LARGE = 64 * 2**20


class OnnxExport(NamedTuple):
    """What :func:`export_onnx` wrote. ``report`` is what ``parity.json`` holds."""

    out_dir: Path
    files: dict[str, Path]
    manifest: dict[str, Any]
    report: dict[str, Any]


def export_onnx(
    model: nn.Module,
    out_dir: str | Path,
    target: str = "portable",
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> OnnxExport:
    """Writes ``model`` as an ONNX file for ``target``, proves it, and describes it in the folder ``out_dir``.

    A HybridLM becomes the one program ``prefill``, which at length 1 is a decode step; any other module becomes
    ``forward``, traced with ``example_inputs`` and ``dynamic_shapes`` as in :func:`gdn_ops.export.export_program`. What
    is proved: the full checker, the stamped opsets, that ONNX Runtime loads the file, and that it gives eager's numbers
    on the CPU at several lengths and batches, from fresh and from used states; the reference evaluator of the onnx
    package gives them too, where the model is small enough for it. ``parity.json`` has the figures, and which operators
    ran as kernels and which as the bodies in the file. ``out_dir`` may exist if it is empty or a previous export; it
    appears whole or not at all.

    Args:
        target: ``"portable"``, ``"ort"`` or ``"onnx27"``.

    Raises:
        ValueError: unknown ``target``; bad ``example_inputs``; ``out_dir`` in use by something else; an operator, a
            dtype or packed sequences (``cu_seqlens``) that the target has no form for; a file that ONNX Runtime does
            not load.
        TypeError: ``model`` or ``example_inputs`` of a wrong type.
        ParityError: the file does not give eager's numbers; nothing is written.
        ModuleNotFoundError: a package of the extra ``gdn-ops[onnx]`` is missing.

    Example::

        >>> result = export_onnx(model, "out", target="ort")  # doctest: +SKIP
        >>> result.report["nodes"]["kernels"]  # doctest: +SKIP
        {'com.microsoft::CausalConvWithState': 2, 'com.microsoft::LinearAttention': 2}
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    need_packages("export_onnx")
    out_dir = check_destination(out_dir)
    plans = plan(model, example_inputs, dynamic_shapes)
    inputs = [(item.args, item.kwargs) for item in plans.values()]
    device, dtype = device_of(model, inputs), parity.working_dtype(model, inputs)
    if device.type != "cpu":
        raise ValueError(f"model: expected it on cpu, where the file is proved, got {device.type}: use model.cpu()")
    onnx_proof.refuse_dtype(dtype, target)
    with replacing(out_dir) as work:
        report = _write(model, plans, device, dtype, target, work)
    manifest = read_manifest(out_dir)
    files = {path.name: path for path in sorted(out_dir.iterdir())}
    return OnnxExport(out_dir, files, manifest, report)


def need_packages(caller: str) -> None:
    """ModuleNotFoundError unless the packages of the extra ``onnx`` are installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            message = f"{caller} needs {error.name}: pip install 'gdn-ops[onnx]'"
            raise ModuleNotFoundError(message, name=error.name) from error


class Graph(NamedTuple):
    """A file of one program that is valid, and not yet proved; ``entry`` describes it in the manifest."""

    name: str
    program: ExportedProgram | None  # None for a language model, which is put together from several
    entry: dict[str, Any]
    lowered: Lowered
    path: Path


def write_graph(plans: dict[str, Plan], target: str, folder: Path) -> Graph:
    """Writes the first of ``plans`` (joined with ``step``, if that is there) to ``folder`` and checks its form."""
    import onnx_ir as ir

    name, item = next(iter(plans.items()))
    if "step" in plans:
        from gdn_ops.export.onnx_layers import language_model

        program, (graph, entry) = None, language_model(item, target)
    else:
        program = export_plan(item)
        graph, entry = onnx_graph.module(name, item, program, target)
    onnx_graph.transpose_weights(graph)
    for bounds in entry["dynamic"].values():
        bounds["min"] = max(bounds["min"], 1)  # runtimes do not loop over nothing
    lowered = lower(graph, target)
    graph.producer_name, graph.producer_version = "gdn_ops", _version()
    large = sum(x.const_value.nbytes for x in graph.graph.initializers.values() if x.const_value is not None) > LARGE
    ir.save(graph, folder / FILE, external_data=DATA if large else None)
    for path in folder.glob(f"{FILE}*"):
        show(path)
    entry |= {"opsets": onnx_proof.check(folder / FILE, lowered.opset), **manifests.describe_file(folder / FILE)}
    if large:
        entry["data"] = [manifests.describe_file(folder / DATA)]
    return Graph(name, program, entry, lowered, folder / FILE)


def prove(plans: dict[str, Plan], graph: Graph, dtype: torch.dtype, target: str) -> dict[str, Any]:
    """The parity report of a file, with eager beside it; raises ParityError if it does not give eager's numbers."""
    return onnx_proof.prove(plans, graph.program, graph.entry, graph.path, graph.lowered, dtype, target)


def versions() -> dict[str, str]:
    """Of the packages that make and prove the files."""
    import onnx
    import onnxruntime
    import onnxscript

    return {x.__name__: x.__version__ for x in (onnx, onnxruntime, onnxscript)}


def _write(
    model: nn.Module, plans: dict[str, Plan], device: torch.device, dtype: torch.dtype, target: str, folder: Path
) -> dict[str, Any]:
    graph = write_graph(plans, target, folder)
    report = prove(plans, graph, dtype, target)
    graph.entry["nodes"] = report["nodes"]
    with inference(model):
        manifest = manifests.describe(model, device, dtype, {graph.name: graph.entry}, target, **versions())
    (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return report


def _version() -> str:
    import gdn_ops

    return gdn_ops.__version__
