"""A model as one TensorRT engine for prefill and decode, with named states, made from the ONNX file that was proved.

The file is that of :func:`gdn_ops.export.export_onnx`, target ``portable``: a loop over chunks inside the engine and a
branch for one token. TensorRT-RTX builds it on any machine, GPU or not, for the GPUs that it knows; it refuses to run
on Hopper. Full TensorRT takes plugins in the operators' place (``gdn_ops.lowering.tensorrt``). The manifest says which
way was taken, and why.

One engine has two optimisation profiles: ``decode`` (one token a row) and ``prefill`` (any length). Inputs and outputs
have the names of the ONNX file: ``input_ids [batch, T]``, every state, ``logits`` and ``present.<state>``. TensorRT-RTX
runs it, with torch for the memory, on a GPU of compute capability 8.0, 8.6, 8.9 or 12.x::

    import json, torch, tensorrt_rtx as trt
    manifest, batch, T = json.load(open("out/manifest.json")), 1, 70
    program, start = manifest["programs"]["prefill"], manifest["initial_state"]
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(open("out/model.engine", "rb").read())
    context, stream = engine.create_execution_context(), torch.cuda.current_stream().cuda_stream
    context.set_optimization_profile_async(1, stream)  # 0 is decode, 1 is prefill
    sizes, memory = {"batch": batch, "T": T}, {}
    for x in program["inputs"] + program["outputs"]:
        shape, dtype = [sizes.get(n, n) for n in x["shape"]], getattr(torch, x["dtype"])
        memory[x["name"]] = torch.full(shape, start.get(x["name"], 0), dtype=dtype, device="cuda")
        if x in program["inputs"]:
            context.set_input_shape(x["name"], shape)
        context.set_tensor_address(x["name"], memory[x["name"]].data_ptr())
    context.execute_async_v3(stream)
    logits = memory["logits"]  # and memory[program["states"][name]] is the next call's memory[name]

An export is a folder: ``model.engine``, ``model.onnx`` (with ``model.onnx.data``, if the weights are large),
``layers.json``, ``manifest.json`` and ``parity.json``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export import onnx as onnx_files
from gdn_ops.export import onnx_proof, parity
from gdn_ops.export import tensorrt_runtime as runtimes
from gdn_ops.export.destination import check_destination, replacing
from gdn_ops.export.program import Plan, device_of, inference, is_language_model, plan
from gdn_ops.export.runner import read_manifest
from gdn_ops.export.tensorrt_engine import Engine, build_engine, check_profiles, default_profiles
from gdn_ops.export.tensorrt_runtime import Options, Runtime
from torch import nn
from torch.utils import _pytree as pytree

ENGINE, LAYERS = "model.engine", "layers.json"
Progress = Callable[[str, int, int], None]


class TensorRTExport(NamedTuple):
    """What :func:`build_tensorrt` wrote. ``report`` is what ``parity.json`` holds, ``layers`` what ``layers.json``."""

    out_dir: Path
    files: dict[str, Path]
    manifest: dict[str, Any]
    report: dict[str, Any]
    layers: dict[str, Any]


def build_tensorrt(
    model: nn.Module,
    out_dir: str | Path,
    *,
    runtime: str | None = None,
    profiles: dict[str, dict[str, Any]] | None = None,
    compute_capabilities: Sequence[str] | None = None,
    hardware_compatible: str | None = None,
    version_compatible: bool = False,
    timing_cache: str | Path | None = None,
    optimization_level: int | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> TensorRTExport:
    """Builds ``model`` into one TensorRT engine, strongly typed in the model's dtype, and describes it in ``out_dir``.

    The ONNX file that the engine is made from gives eager's numbers in ONNX Runtime on the CPU, or nothing is written
    (a bfloat16 file, which ONNX Runtime cannot run, is held against its float32 twin node by node, and the twin is
    run). The engine itself is not run here. ``out_dir`` may exist if it is empty or a previous export; it appears whole
    or not at all.

    Args:
        runtime: ``"tensorrt"``, ``"tensorrt-rtx"``, or None for the first of them that can build here.
        profiles: by name, ``(min, opt, max)`` or one integer for each dynamic size; the first is profile 0. None, for
            a HybridLM: ``decode`` with T = 1 and ``prefill`` with T = 2, 512, 4096, each for a batch of 1, 1, 8.
        compute_capabilities: the GPUs that TensorRT-RTX builds for, such as ``("sm_89", "sm_120")``; None: all.
        hardware_compatible: ``"ampere_plus"`` or ``"same_compute_capability"``; full TensorRT only.
        version_compatible: for later versions too; full TensorRT only.
        timing_cache: a file that is read if it exists, and written; full TensorRT only.
        optimization_level: 0 (builds fastest) to 5; None: the builder's own.
        example_inputs, dynamic_shapes: of a module that is no HybridLM, as in
            :func:`gdn_ops.export.export_program`; then ``profiles`` must be given if a size is dynamic.
        progress: called with the name of a phase, the steps done, and its steps.

    Raises:
        ValueError: an unknown ``runtime``; an option that it has not; sizes outside what was exported; a model that
            has no ONNX form (see :func:`gdn_ops.export.export_onnx`); ``out_dir`` in use by something else.
        TypeError: ``model``, ``profiles`` or ``example_inputs`` of a wrong type.
        ModuleNotFoundError: TensorRT or a package of ``gdn-ops[onnx]`` is missing; the message says how to get it.
        RuntimeError: TensorRT does not load, needs a GPU that is not there, or builds no engine.
        ParityError: the ONNX file does not give eager's numbers.

    Example::

        >>> result = build_tensorrt(model, "out", compute_capabilities=("sm_89",))  # doctest: +SKIP
        >>> result.manifest["tensorrt"]["path"]  # doctest: +SKIP
        'tensorrt-rtx portable'
    """
    onnx_files.need_packages("build_tensorrt")
    found = runtimes.find(runtime)
    capabilities = None if compute_capabilities is None else tuple(compute_capabilities)
    options = Options(capabilities, hardware_compatible, version_compatible, timing_cache, optimization_level)
    runtimes.check_options(found, options)
    out_dir = check_destination(out_dir)
    plans = plan(model, example_inputs, dynamic_shapes)
    inputs = [(item.args, item.kwargs) for item in plans.values()]
    device, dtype = device_of(model, inputs), parity.working_dtype(model, inputs)
    if device.type != "cpu":
        raise ValueError(
            f"model: expected it on cpu, where its ONNX file is proved, got {device.type}: use model.cpu()"
        )
    if dtype != torch.bfloat16:
        onnx_proof.refuse_dtype(dtype, "tensorrt")
    if is_language_model(model) and profiles is None:
        profiles = default_profiles()
    with replacing(out_dir) as work:
        report, layers = _write(model, plans, dtype, found, profiles, options, progress, work)
    manifest = read_manifest(out_dir)
    files = {path.name: path for path in sorted(out_dir.iterdir())}
    return TensorRTExport(out_dir, files, manifest, report, layers)


def _write(
    model: nn.Module,
    plans: dict[str, Plan],
    dtype: torch.dtype,
    runtime: Runtime,
    profiles: Any,
    options: Options,
    progress: Progress | None,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    graph = onnx_files.write_graph(plans, "portable", folder)
    dynamic = graph.entry["dynamic"]
    checked = check_profiles({"forward": {}} if profiles is None and not dynamic else profiles, dynamic)
    report = prove(model, plans, graph, dtype)
    if runtime.plugins:
        report["proved"] += "; in the engine, plugins are in the place of its functions"
    with _source(runtime, graph.path) as (source, nodes):
        engine = build_engine(runtime, source, graph.entry, checked, options, folder / ENGINE, progress)
    described = describe(graph.entry, engine)
    with inference(model):
        device = torch.device("cpu")
        versions = onnx_files.versions() | {runtime.name: runtime.version}
        manifest = manifests.describe(model, device, dtype, {graph.name: described}, "tensorrt", **versions)
    manifest["device"] = "cuda"
    manifest["tensorrt"] = {
        "path": f"{runtime.name} {'plugins' if runtime.plugins else 'portable'}",
        "reason": runtime.reason,
        "version": runtime.version,
        "executed": False,
        "plugins": nodes,
        "layers": LAYERS,
        **engine.described,
    }
    for name, value in ((LAYERS, engine.layers), ("parity.json", report), ("manifest.json", manifest)):
        (folder / name).write_text(json.dumps(value, indent=1 if name == LAYERS else 2) + "\n")
    return report, engine.layers


@contextlib.contextmanager
def _source(runtime: Runtime, path: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """The file that the engine is built from, and the plugins in it: with full TensorRT, they replace the functions."""
    if not runtime.plugins:
        yield path, {}
        return
    from gdn_ops.lowering.tensorrt import onnx_nodes, plugins

    plugins.register()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / onnx_files.FILE
        large = path.with_name(onnx_files.DATA).exists()
        yield source, onnx_nodes.with_plugins(path, source, onnx_files.DATA if large else None)


def describe(entry: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """The program's entry with the engine as its file and the ONNX file beside it."""
    onnx_file = {key: entry[key] for key in ("file", "size", "sha256")}
    return {**entry, **manifests.describe_file(engine.path), "data": [onnx_file, *entry.get("data", ())]}


def prove(model: nn.Module, plans: dict[str, Plan], graph: onnx_files.Graph, dtype: torch.dtype) -> dict[str, Any]:
    """The parity report of the file, or of its float32 twin where ONNX Runtime cannot run the file itself."""
    if dtype != torch.bfloat16:
        report = onnx_files.prove(plans, graph, dtype, "tensorrt")
        return {**report, "proved": "the ONNX file of the engine"}
    twin = copy.deepcopy(model).float()
    if is_language_model(model):
        wide = plan(twin)
    else:
        (item,) = plans.values()
        inputs = pytree.tree_map(_widen, item.kwargs or item.args)
        wide = plan(twin, inputs, item.dynamic_shapes)
    with tempfile.TemporaryDirectory() as folder:
        proved = onnx_files.write_graph(wide, "portable", Path(folder))
        compare_nodes(graph.path, proved.path)
        report = onnx_files.prove(wide, proved, torch.float32, "tensorrt")
    return {**report, "proved": "the float32 twin of the ONNX file, which has the same nodes but for casts"}


def _widen(x: Any) -> Any:
    return x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x


def compare_nodes(path: Path, twin: Path) -> None:
    """RuntimeError unless two ONNX files are the same nodes in the same order but for casts."""
    (first, second) = ([x for x in _nodes(file) if not x.endswith("::Cast")] for file in (path, twin))
    for index, (a, b) in enumerate(zip(first, second)):
        if a != b:
            raise RuntimeError(f"model: the bfloat16 file and its float32 twin differ at node {index}: {a} and {b}")
    if len(first) != len(second):
        raise RuntimeError(f"model: the bfloat16 file has {len(first)} nodes, its float32 twin {len(second)}")


def _nodes(path: Path) -> list[str]:
    import onnx_ir as ir

    return [f"{x.domain}::{x.op_type}" for x in ir.traversal.RecursiveGraphIterator(ir.load(path).graph)]
