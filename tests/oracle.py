"""The one oracle of the tests: how inputs are made, how an error is measured, and how large it may be.

Error is ``RMS(x - ref) / RMS(ref)`` against ``gdn_ops.reference`` in fp64 on the same, already rounded, inputs. The
bounds are those of the numerics table: ``values`` for outputs and final states, ``grads`` for the gradients of q, k, v,
states and weights, ``gates`` for those of g and beta. For fp64 gradients the table asks for gradcheck alone; they are
also held to 1e-11 here (strong gates sum to 1e4 and more, which costs four of fp64's sixteen digits).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gdn_ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="a Hopper GPU is needed"
)
GRADIENTS = ("q", "k", "v", "g", "beta", "initial_state")


class Tolerance(NamedTuple):
    """Largest allowed relative RMS errors for one input dtype."""

    values: float
    grads: float
    gates: float


TOLERANCE = {
    torch.float64: Tolerance(1e-12, 1e-11, 1e-11),
    torch.float32: Tolerance(1e-5, 5e-5, 5e-5),
    torch.float16: Tolerance(2e-3, 4e-3, 1e-2),
    torch.bfloat16: Tolerance(5e-3, 8e-3, 1.5e-2),
}


def error(x: Tensor, ref: Tensor) -> float:
    """Relative RMS error; infinite for values that are not finite, or for any difference from an all-zero ``ref``."""
    x, ref = x.detach().double().cpu(), ref.detach().double().cpu()
    if x.shape != ref.shape:
        raise AssertionError(f"expected shape {tuple(ref.shape)}, got {tuple(x.shape)}")
    if x.numel() == 0:
        return 0.0
    if not bool(x.isfinite().all()):
        return float("inf")
    difference, size = (x - ref).square().mean().sqrt().item(), ref.square().mean().sqrt().item()
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def assert_close(x: Tensor, ref: Tensor, tol: float, name: str) -> None:
    """Fails unless the shapes agree and ``error(x, ref) <= tol``."""
    e = error(x, ref)
    assert e <= tol, f"{name}: relative RMS error {e:.3e} exceeds {tol:.1e} (shape {tuple(ref.shape)}, {x.dtype})"


def make_inputs(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    initial_state: bool = False,
    cu_seqlens: list[int] | Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Inputs of the rule by argument name, as a trained model gives them: unit keys and queries, mixed gates.

    Drawn in fp64 on the CPU, so that a seed means the same numbers on every device and, up to rounding, in every dtype.
    g, beta and states are fp32 (fp64 with fp64).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    v, beta = normal(B, T, HV, V), normal(B, T, HV).sigmoid()
    g = -torch.rand(B, T, HV, generator=generator, dtype=torch.float64) * torch.rand(HV, generator=generator).double()
    if cu_seqlens is not None:
        cu_seqlens = torch.as_tensor(cu_seqlens)
        cu_seqlens = (cu_seqlens if cu_seqlens.dtype == torch.int64 else cu_seqlens.int()).to(device)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    state = normal(N, HV, K, V).to(device, wide) if initial_state else None
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    g, beta = (x.to(device, wide) for x in (g, beta))
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state, "cu_seqlens": cu_seqlens}


def suited(function: Callable, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Those of ``inputs`` that ``function`` takes: gated linear attention has no ``beta``."""
    return {n: x for n, x in inputs.items() if n in inspect.signature(function).parameters}


def make_inputs_of(function: Callable, *sizes, **options) -> dict[str, Tensor | None]:
    """What :func:`make_inputs` makes, as far as ``function`` takes it."""
    return suited(function, make_inputs(*sizes, **options))


def leaves(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same inputs, each differentiable one a fresh leaf (strides kept)."""
    return {n: x.detach().requires_grad_() if x is not None and n in GRADIENTS else x for n, x in inputs.items()}


def cotangents(inputs: dict[str, Tensor | None], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients for ``o`` (v's dtype) and ``final_state`` that belong to these inputs."""
    generator = torch.Generator().manual_seed(seed)
    q, v, cu_seqlens = inputs["q"], inputs["v"], inputs["cu_seqlens"]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    do = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    ds = torch.randn(N, v.shape[2], q.shape[3], v.shape[3], generator=generator, dtype=torch.float64)
    return do.to(v.device, v.dtype), ds.to(v.device, wide)


def expected(inputs: dict[str, Tensor | None], scale: float | None = None, **cotangent: Tensor) -> dict[str, Tensor]:
    """``o`` and ``final_state`` of the specification in fp64, and with ``do=``, ``ds=`` every gradient by name.

    Inputs without ``beta`` are those of gated linear attention.
    """
    rule = reference.gated_delta_rule if "beta" in inputs else reference.gated_linear_attention
    wide = {n: x if x is None or n == "cu_seqlens" else x.detach().cpu().double() for n, x in inputs.items()}
    wide = leaves(wide) if cotangent else wide
    if wide["cu_seqlens"] is not None:
        wide["cu_seqlens"] = wide["cu_seqlens"].cpu()
    o, final_state = rule(**wide, scale=scale)
    results = {"o": o.detach(), "final_state": final_state.detach()}
    if cotangent:
        loss = (o * cotangent["do"].cpu().double()).sum() + (final_state * cotangent["ds"].cpu().double()).sum()
        names = [n for n in GRADIENTS if wide.get(n) is not None]
        grads = torch.autograd.grad(loss, [wide[n] for n in names], allow_unused=True)
        for n, grad in zip(names, grads):
            results["d" + n] = torch.zeros_like(wide[n]) if grad is None else grad
    return results


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    """The table's bound for a result of this name (``o``, ``final_state``, ``dq``, ``dg``, ...)."""
    tolerance = TOLERANCE[dtype]
    if name in ("dg", "dbeta"):
        return tolerance.gates
    return tolerance.values if not name.startswith("d") else tolerance.grads


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Each result of ``got`` against ``want`` inside the table; the names must agree."""
    assert got.keys() == want.keys()
    failures = [
        f"{n}: {e:.2e} > {tolerance_of(n, dtype):.1e}"
        for n in want
        if not (e := error(got[n], want[n])) <= tolerance_of(n, dtype)
    ]
    assert not failures, "; ".join(failures)


def run_with_gradients(
    function, inputs: dict[str, Tensor | None], do: Tensor, ds: Tensor, **flags
) -> dict[str, Tensor]:
    """``function`` of the public API on leaves of ``inputs``: outputs and gradients, named as in :func:`expected`."""
    x = leaves(inputs)
    o, final_state = function(**x, output_final_state=True, **flags)
    names = [n for n in GRADIENTS if x.get(n) is not None]
    grads = torch.autograd.grad([o, final_state], [x[n] for n in names], [do, ds])
    return {"o": o, "final_state": final_state, **{"d" + n: grad for n, grad in zip(names, grads)}}


def make_conv_inputs(
    B: int,
    T: int,
    D: int,
    W: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    bias: bool = True,
    initial_state: bool = False,
    cu_seqlens: list[int] | Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Inputs of the short convolution by argument name."""
    generator = torch.Generator().manual_seed(seed)
    if cu_seqlens is not None:
        cu_seqlens = torch.as_tensor(cu_seqlens)
        cu_seqlens = (cu_seqlens if cu_seqlens.dtype == torch.int64 else cu_seqlens.int()).to(device)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return {
        "x": normal(B, T, D),
        "weight": normal(D, W) * 0.5,
        "bias": normal(D) if bias else None,
        "initial_state": normal(N, D, W - 1) if initial_state else None,
        "cu_seqlens": cu_seqlens,
    }
