"""``gdn doctor``: what this machine has, and whether the operators give the specification's numbers on it.

The report is plain text to paste into an issue. Each probe compares an operator with ``gdn_ops.reference`` in fp64 on
the same inputs, in float32 and bfloat16, on the CPU and on each kind of device that is there; the last one compiles a
small function in one graph. Exit code 1 if a probe failed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "typer", "rich", "matplotlib", "transformers", "onnx",
    "onnxruntime", "onnxscript", "tensorrt", "tensorrt-rtx", "flash-linear-attention",
)  # fmt: skip
# Against the reference in fp64: the operators' table (values, gradients), and in bfloat16 with room for rounded gates.
BOUNDS = {"float32": (1e-5, 5e-5), "bfloat16": (5e-3, 1.5e-2)}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="The same report as JSON.")] = False,
) -> None:
    """Reports on this machine and tries each operator."""
    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else _plain(report))
    if not report["ok"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The report as a dict of plain values."""
    probes = list(_probes())
    return {
        "versions": _versions(),
        "devices": _devices(),
        "compiler": _compiler(),
        "operators": _operators(),
        "probes": probes,
        "ok": all(probe["ok"] for probe in probes),
    }


def _plain(report: dict[str, Any]) -> str:
    lines = []
    for title in ("versions", "devices", "compiler", "operators"):
        lines += [title, *(f"  {name:36} {value}" for name, value in report[title].items()), ""]
    lines.append("probes (error against the reference)")
    for probe in report["probes"]:
        outcome = "ok" if probe["ok"] else "FAILED"
        figure = f"{probe['error']:.1e}" if probe["error"] is not None else ""
        lines.append(f"  {outcome:7} {probe['name']:56} {figure:8} {probe['seconds']:6.2f} s  {probe['note']}".rstrip())
    failed = sum(not probe["ok"] for probe in report["probes"])
    lines += ["", f"{failed} of {len(report['probes'])} probes failed" if failed else "all probes passed"]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import gdn_ops

    found = {"gdn_ops": gdn_ops.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{platform.machine()} {capability}, {cores} cores, {torch.get_num_threads()} threads"}
    if torch.version.hip or torch.version.cuda:
        found["torch built for"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{device.name}, capability {device.major}.{device.minor}, {memory}"
    if not torch.cuda.device_count():
        found["cuda"] = "none"
    return found


def _compiler() -> dict[str, str]:
    from gdn_ops.lowering.inductor import compiler

    try:
        path = compiler()
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
        version = (done.stdout or done.stderr).strip().splitlines()
    except RuntimeError:
        return {"C++": "none: torch.compile and export on CPU need g++, or one named by CXX"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"C++": f"does not run: {error}"}
    return {"C++": version[0] if version else path}


def _operators() -> dict[str, str]:
    import torch

    keys = ("CPU", "CUDA", "Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted({name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gdn::")})
    return {name: " ".join(key for key in keys if has(name, key)) for name in names}


def _probes() -> Iterator[dict[str, Any]]:
    import torch

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype, (values, gradients) in BOUNDS.items():
            for name, probe in PROBES.items():
                bound = gradients if "gradients" in name else values
                yield _tried(f"{name}, {device} {dtype}", bound, probe, device, getattr(torch, dtype))
        yield _tried(f"torch.compile(fullgraph=True), {device} float32", 5e-5, _compiled, device, torch.float32)


def _tried(name: str, bound: float, probe: Callable, device: str, dtype: torch.dtype) -> dict[str, Any]:
    start, note, error = time.perf_counter(), "", None
    try:
        error = probe(device, dtype)
        ok = error <= bound
        note = "" if ok else f"expected at most {bound:g}"
    except Exception as failure:  # whatever goes wrong on a machine belongs into its report
        ok, note = False, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return {"name": name, "ok": ok, "error": error, "note": note, "seconds": round(time.perf_counter() - start, 3)}


def _error(got: Any, expected: Any) -> float:
    """The largest relative RMS error among pairs of tensors; not a number counts as infinite."""
    worst = 0.0
    for x, reference in zip(got, expected, strict=True):
        x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
        value = ((x - reference).square().mean().sqrt() / reference.square().mean().sqrt()).item()
        worst = max(worst, value if value == value else float("inf"))
    return worst


def _rule_inputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, g, beta, initial state: two sequences of 70 tokens (a chunk and a bit), grouped value heads."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 2, 70, 2, 32, generator=generator), dim=-1)
    v, gates = torch.randn(2, 70, 4, 48, generator=generator), torch.rand(2, 2, 70, 4, generator=generator)
    state = torch.randn(2, 4, 32, 48, generator=generator)
    wide = [x.to(device) for x in (-gates[0], gates[1], state)]
    return [*(x.to(device, dtype) for x in (q, k, v)), *wide]


def _rule_expected(inputs: list[torch.Tensor], gradients: bool = False) -> tuple[torch.Tensor, ...]:
    """Of the gated delta rule, or, for inputs without beta, of gated linear attention."""
    import torch

    from gdn_ops import reference

    *tokens, state = wide = [x.detach().cpu().double().requires_grad_(gradients) for x in inputs]
    rule = reference.gated_delta_rule if len(tokens) == 5 else reference.gated_linear_attention
    o, final_state = rule(*tokens, initial_state=state)
    return torch.autograd.grad(_scalar(o, final_state), wide) if gradients else (o, final_state)


def _scalar(o: torch.Tensor, final_state: torch.Tensor) -> torch.Tensor:
    """One number that depends on all results, unevenly."""
    import torch

    weights = torch.linspace(-1, 1, o.shape[1], dtype=torch.float64).to(o.device)[:, None, None]
    return (o.double() * weights).sum() + (final_state.double() * 0.1).sum()


def _rule(name: str, device: str, dtype: torch.dtype) -> float:
    import gdn_ops

    *inputs, state = tensors = _inputs_of(name, device, dtype)
    result = getattr(gdn_ops, name)(*inputs, initial_state=state, output_final_state=True)
    return _error(result, _rule_expected(tensors))


def _rule_gradients(name: str, device: str, dtype: torch.dtype) -> float:
    import torch

    import gdn_ops

    *inputs, state = tensors = [x.requires_grad_() for x in _inputs_of(name, device, dtype)]
    result = getattr(gdn_ops, name)(*inputs, initial_state=state, output_final_state=True)
    return _error(torch.autograd.grad(_scalar(*result), tensors), _rule_expected(tensors, gradients=True))


def _inputs_of(name: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    *inputs, beta, state = _rule_inputs(device, dtype)
    return [*inputs, beta, state] if name.endswith("delta_rule") else [*inputs, state]


def _state_pool(device: str, dtype: torch.dtype) -> float:
    import torch

    import gdn_ops

    *inputs, state = tensors = _rule_inputs(device, dtype)
    pool = torch.zeros(5, *state.shape[1:], device=device)
    slots = torch.tensor([3, 1], dtype=torch.int32, device=device)
    pool[slots.long()] = state
    last = torch.full(inputs[0].shape[:2], -1, dtype=torch.int32, device=device)
    last[0, -1], last[1, -1] = 0, 4
    o_kept = gdn_ops.recurrent_gated_delta_rule_(*inputs, pool, slots, token_state_indices=last)
    o = gdn_ops.recurrent_gated_delta_rule_(*inputs, pool, slots)
    expected = _rule_expected(tensors)
    return _error((o_kept, pool[[0, 4]], o, pool[slots.long()]), expected + expected)


def _conv_inputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 70, 48), (48, 4), (48,), (2, 48, 3))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _conv(device: str, dtype: torch.dtype) -> float:
    import torch

    import gdn_ops
    from gdn_ops import reference

    tensors = [x.requires_grad_() for x in _conv_inputs(device, dtype)]
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    y, state = gdn_ops.causal_conv1d(*tensors, output_final_state=True, activation="silu")
    expected = reference.causal_conv1d(*wide, activation="silu")
    got = torch.autograd.grad(y.double().square().sum(), tensors)
    want = torch.autograd.grad(expected[0].square().sum(), wide)
    return max(_error((y, state), expected), _error(got, want))


def _conv_update(device: str, dtype: torch.dtype) -> float:
    import gdn_ops
    from gdn_ops import reference

    x, weight, bias, state = _conv_inputs(device, dtype)
    expected = reference.causal_conv1d(*(t.cpu().double() for t in (x, weight, bias, state)), activation="silu")
    y = gdn_ops.causal_conv1d_update_(x, state, weight, bias, activation="silu")
    return _error((y, state), expected)


def _compiled(device: str, dtype: torch.dtype) -> float:
    """Forward and backward of convolution and rule in one graph, against the same code run eagerly."""
    import torch

    import gdn_ops

    def scalar(x, weight, g, beta):
        y, _ = gdn_ops.causal_conv1d(x, weight, activation="silu")
        q, k, v = (part.unflatten(-1, (2, 8)) for part in y.chunk(3, -1))
        o, _ = gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        return o.square().sum()

    x, weight, _, _ = _conv_inputs(device, dtype)
    gates = torch.rand(2, 2, 70, 2, generator=torch.Generator().manual_seed(1)).to(device)
    tensors = [t.requires_grad_() for t in (x, weight, -gates[0], gates[1])]
    results = []
    for function in (scalar, torch.compile(scalar, fullgraph=True)):
        value = function(*tensors)
        results.append((value, *torch.autograd.grad(value, tensors)))
    return _error(results[1], results[0])


PROBES = {
    "gdn::chunk_gated_delta_rule": partial(_rule, "chunk_gated_delta_rule"),
    "gdn::chunk_gated_delta_rule gradients": partial(_rule_gradients, "chunk_gated_delta_rule"),
    "gdn::recurrent_gated_delta_rule": partial(_rule, "recurrent_gated_delta_rule"),
    "gdn::recurrent_gated_delta_rule_": _state_pool,
    "gdn::chunk_gated_linear_attention": partial(_rule, "chunk_gated_linear_attention"),
    "gdn::chunk_gated_linear_attention gradients": partial(_rule_gradients, "chunk_gated_linear_attention"),
    "gdn::recurrent_gated_linear_attention": partial(_rule, "recurrent_gated_linear_attention"),
    "gdn::causal_conv1d and gradients": _conv,
    "gdn::causal_conv1d_update_": _conv_update,
}
