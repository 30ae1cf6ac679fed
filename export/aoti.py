"""A model as AOTInductor packages that run without this package, without Triton kernels of ours, and without Python.

On CUDA a package holds the cubins of the kernels; on CPU it holds their C++ form (``gdn_ops.lowering.inductor``). An
export is a folder: one ``.pt2`` a program, ``manifest.json`` and ``parity.json``. Plain torch runs it::

    import json, torch
    manifest, batch = json.load(open("out/manifest.json")), 2
    states = [x for x in manifest["programs"]["prefill"]["inputs"] if x["role"] == "state"]
    shapes = {x["name"]: [batch if n == "batch" else n for n in x["shape"]] for x in states}
    start, dtypes = manifest["initial_state"], {x["name"]: getattr(torch, x["dtype"]) for x in states}
    state = {name: torch.full(shape, start[name], dtype=dtypes[name]) for name, shape in shapes.items()}
    prefill = torch._inductor.aoti_load_package("out/prefill.pt2")
    logits, state = prefill(torch.zeros(batch, 70, dtype=torch.long), state)

In C++ it is ``torch::inductor::AOTIModelPackageLoader``, inputs and outputs in the manifest's order. Inputs must be
contiguous. :func:`load_package` does the same with checks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export import parity
from gdn_ops.export.destination import check_destination, replacing
from gdn_ops.export.program import Plan, device_of, export_plan, inference, is_language_model, plan
from gdn_ops.export.runner import read_manifest
from gdn_ops.lowering.inductor import packaging, unsupported_operators
from torch import nn

from gdn_ops.files import Archive


class ExportResult(NamedTuple):
    """What :func:`export_aoti` wrote."""

    out_dir: Path
    files: dict[str, Path]
    manifest: dict[str, Any]
    parity: dict[str, Any]


def export_aoti(
    model: nn.Module, out_dir: str | Path, example_inputs: Any = None, dynamic_shapes: Any = None
) -> ExportResult:
    """Compiles ``model`` ahead of time, compares every program with eager, and writes the folder ``out_dir``.

    Programs are those of :func:`gdn_ops.export.export_program`: ``prefill`` and ``step`` of a HybridLM, ``forward`` of
    any other module. Device and dtype are the model's. The weights are in every package. ``out_dir`` may exist if it is
    empty or a previous export; it appears whole or not at all.

    Raises:
        ValueError: bad ``example_inputs``, ``out_dir`` in use by something else, an operator that cannot be packed.
        TypeError: ``model`` or ``example_inputs`` of a wrong type.
        ParityError: a compiled program does not give eager's numbers; nothing is written.
        OSError: ``out_dir`` cannot be written, as on a full disk; nothing is left there.
        RuntimeError: no C++ compiler.

    Example::

        >>> result = export_aoti(model, "out")  # doctest: +SKIP
        >>> sorted(result.files)  # doctest: +SKIP
        ['prefill', 'step']
    """
    out_dir = check_destination(out_dir)
    plans = plan(model, example_inputs, dynamic_shapes)
    inputs = [(item.args, item.kwargs) for item in plans.values()]
    device, dtype = device_of(model, inputs), parity.working_dtype(model, inputs)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"model: expected it on cpu or cuda, got {device.type}")
    with replacing(out_dir) as work:
        report = _write(model, plans, device, dtype, work)
    manifest = read_manifest(out_dir)
    files = {name: out_dir / entry["file"] for name, entry in manifest["programs"].items()}
    return ExportResult(out_dir, files, manifest, report)


def _write(
    model: nn.Module, plans: dict[str, Plan], device: torch.device, dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    programs, entries, loaded = {}, {}, {}
    for name, item in plans.items():
        programs[name] = export_plan(item)
        manifests.refuse_results(item, programs[name], int, torch.SymInt)
        entries[name] = manifests.describe_program(item, programs[name])
        _refuse_unsupported(name, programs[name], entries[name]["operators"], device)
        _refuse_numbers(item, programs[name])
    for name, program in programs.items():
        path = folder / f"{name}.pt2"
        with packaging(device) as configs, torch.no_grad(), Archive(path, "w") as file:
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
        loaded[name] = torch._inductor.aoti_load_package(str(path))
        entries[name] |= manifests.describe_file(path)
    report = parity.Report(dtype, target="aoti", device=device.type)
    if is_language_model(model):
        parity.language_model(report, plans, loaded)
    else:
        item, program = plans["forward"], programs["forward"]
        names = manifests.dimension_names(item, program)
        outputs = [output["name"] for output in entries["forward"]["outputs"]]
        parity.module(report, item, program, loaded["forward"], names, outputs)
    report.check()
    with inference(model):
        manifest = manifests.describe(model, device, dtype, entries)
    (folder / "parity.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return report.to_dict()


def _refuse_numbers(item: Plan, program: torch.export.ExportedProgram) -> None:
    """Inductor's packages lose what is written to a buffer of one number."""
    for name, kind in manifests.writes(item, program).items():
        buffer = program.state_dict.get(name, program.constants.get(name))
        if kind != "input" and isinstance(buffer, torch.Tensor) and buffer.numel() == 1:
            raise ValueError(f"model: expected several numbers in the buffer {name}, which it writes in place, got one")


def _refuse_unsupported(
    name: str, program: torch.export.ExportedProgram, used: list[str], device: torch.device
) -> None:
    dtypes = {x.dtype for x in (*program.state_dict.values(), *manifests.user_tensors(program))}
    reasons = unsupported_operators(used, device, dtypes)
    if reasons:
        listed = "; ".join(f"{operator}: {reason}" for operator, reason in reasons.items())
        raise ValueError(f"model: program {name!r} cannot go into a package for {device.type}: {listed}")
