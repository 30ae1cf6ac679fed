"""What an ONNX file is checked for before it is handed over: form, stamps, numbers, and who computes what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export import parity
from gdn_ops.export.onnx_session import Session
from gdn_ops.export.program import Plan, flatten_state, inference
from gdn_ops.lowering.onnx.rule import CHUNK
from gdn_ops.lowering.onnx.stamps import check_stamps
from gdn_ops.lowering.onnx.targets import Lowered
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

# The reference evaluator is NumPy, a node at a time: a second or two up to this size.
EVALUATED_BYTES, EVALUATED_LENGTHS = 32 * 2**20, (1, 5)


def refuse_dtype(dtype: torch.dtype, target: str) -> None:
    """ValueError for a dtype that no runtime at hand can prove, with what to use instead."""
    if dtype == torch.float64:
        raise ValueError(
            f"model: float64 has no form in target {target!r}, whose rule is computed in float32: use model.float(), "
            "or export_aoti for float64 on CPU"
        )
    if dtype == torch.bfloat16:
        raise ValueError(
            f"model: bfloat16 cannot be proved in target {target!r}: ONNX Runtime has no bfloat16 matrix product on "
            "the CPU, so it does not load the file; use model.float() (bfloat16 weights are exact in it), "
            "model.half(), or export_aoti, which carries bfloat16"
        )


def check(path: Path, opset: int) -> dict[str, int]:
    """The full checker on the file, and its stamps; returns the opsets by domain."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValueError(f"model: the file is not valid ONNX: {error}") from error
    return check_stamps(onnx.load(str(path), load_external_data=False), opset)


def prove(
    plans: dict[str, Plan],
    program: ExportedProgram | None,
    entry: dict[str, Any],
    path: Path,
    lowered: Lowered,
    dtype: torch.dtype,
    target: str,
) -> dict[str, Any]:
    """Runs the file beside eager. Raises ParityError unless every case is within the tolerance.

    Returns what goes into ``parity.json``: the cases; ``nodes``, how many of each operator ran as ``kernels`` and how
    many as ``bodies`` of the file; and ``reference_evaluator``, the cases of the onnx package's evaluator.
    """
    session = Session(path)
    report = parity.Report(dtype, target=target, device="cpu")
    evaluated = parity.Report(dtype, target=target, device="cpu", runtime="onnx.reference")
    _compare(report, plans, program, entry, session)
    nodes = _who_computes(lowered, session.close())
    report.check()
    reason = _not_evaluated(path)
    if reason is None:
        _evaluate(evaluated, plans, program, entry, path)
        evaluated.check()
    evaluation = {"skipped": reason} if reason else evaluated.to_dict()
    return {**report.to_dict(), "nodes": nodes, "reference_evaluator": evaluation}


def _compare(
    report: parity.Report, plans: dict[str, Plan], program: ExportedProgram | None, entry: dict[str, Any], run: Callable
) -> None:
    if "prefill" in plans:
        states = plans["prefill"].states

        def prefill(input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            logits, *new = run(input_ids, *state.values())
            return logits, dict(zip(states, new))

        def step(input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            logits, new = prefill(input_ids[:, None], state)
            return logits[:, 0], new

        parity.language_model(report, plans, {"prefill": prefill, "step": step})
        return
    item = plans["forward"]
    names = manifests.dimension_names(item, program)
    outputs = [output["name"] for output in entry["outputs"]]
    parity.module(report, item, program, _as_module(run), names, outputs)


def _as_module(run: Callable) -> Callable:
    """``run`` with the module's own arguments and results."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*(x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)))

    return call


def _who_computes(lowered: Lowered, ran: dict[str, set[str]]) -> dict[str, dict[str, int]]:
    kernels, bodies = {}, {}
    for name, count in lowered.nodes.items():
        direct = min(count, len(ran.get(name.split("::")[1], ())))
        kernels |= {name: direct} if direct else {}
        bodies |= {name: count - direct} if count > direct else {}
    return {"kernels": kernels, "bodies": bodies}


def _not_evaluated(path: Path) -> str | None:
    size = sum(x.stat().st_size for x in path.parent.glob(f"{path.name}*"))
    if size > EVALUATED_BYTES:
        return f"the model has {size} bytes, more than the {EVALUATED_BYTES} that NumPy is asked to run"
    return None


def _evaluate(
    report: parity.Report, plans: dict[str, Plan], program: ExportedProgram | None, entry: dict[str, Any], path: Path
) -> None:
    import onnx.reference

    evaluator = onnx.reference.ReferenceEvaluator(str(path), new_ops=[_gather_elements()])
    inputs, outputs = ([x["name"] for x in entry[key]] for key in ("inputs", "outputs"))

    def run(*tensors: Tensor) -> list[Tensor]:
        feeds = {name: tensor.detach().numpy() for name, tensor in zip(inputs, tensors)}
        return [torch.as_tensor(x) for x in evaluator.run(outputs, feeds)]

    if "forward" in plans:
        item = plans["forward"]
        with inference(item.module):
            eager = item.module(*item.args, **item.kwargs)
        errors = parity.compare(_as_module(run)(*item.args, **item.kwargs), eager, outputs)
        report.add("forward", "example", {}, errors)
        return
    module = plans["prefill"].module
    with inference(module):
        state = flatten_state(module.model.init_state(2))
        for T in (*EVALUATED_LENGTHS, CHUNK + 1):
            ids = torch.arange(2 * T).view(2, T) % module.model.config.vocab_size
            logits, new = module(ids, state)
            results = run(ids, *state.values())
            report.add("prefill", f"T={T}", {"batch": 2, "T": T}, parity.compare(results, (logits, new), outputs))
            state = new


def _gather_elements() -> type:
    """The evaluator's own fails on more than 64 elements (a limit of ``numpy.choose``)."""
    import numpy
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        def _run(self, data, indices, axis=0):
            other = [slice(None) if i == axis % data.ndim else slice(n) for i, n in enumerate(indices.shape)]
            return (numpy.take_along_axis(data[tuple(other)], indices, axis),)

    return GatherElements
