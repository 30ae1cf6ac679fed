"""The numerics table at the shapes that the benchmarks time, at their full size.

The reference is the operator itself in fp64, which on CUDA, too, is ``kernels/cpu``: its chunk form is held to 1e-12 of
the recurrence elsewhere, and takes seconds where the recurrence would take minutes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gdn_ops
from perf.providers import difference
from perf.shapes import BACKWARD, FORWARD, Shape, make_inputs
from tests.oracle import TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16 = torch.bfloat16
WIDTHS = [(128, 256), (192, 384), (256, 256), (256, 512)]


def run(inputs: dict[str, Tensor], do: Tensor | None, **options) -> dict[str, Tensor]:
    """``o`` and the final state, with ``do`` also the gradients by name, of the sum over both."""
    leaves = {n: x.detach().requires_grad_(do is not None) for n, x in inputs.items()}
    with torch.set_grad_enabled(do is not None):
        o, state = gdn_ops.chunk_gated_delta_rule(**leaves, output_final_state=True, **options)
    results = {"o": o.detach(), "final_state": state.detach()}
    if do is not None:
        grads = torch.autograd.grad([o, state], list(leaves.values()), [do.to(o.dtype), torch.ones_like(state)])
        results |= {"d" + n: grad for n, grad in zip(leaves, grads)}
    return results


def check(inputs: dict[str, Tensor], do: Tensor | None, **options) -> None:
    got = run(inputs, do, **options)
    want = run({n: x.double() for n, x in inputs.items()}, do, **options)
    bounds = TOLERANCE[BF16]
    errors = {n: difference(got[n], want[n]) for n in want}
    of_gates = dict.fromkeys(("dg", "dbeta"), bounds.gates)
    allowed = {n: of_gates.get(n, bounds.grads if n.startswith("d") else bounds.values) for n in want}
    assert all(errors[n] <= allowed[n] for n in want), {n: f"{e:.2e} of {allowed[n]:.1e}" for n, e in errors.items()}


@pytest.mark.parametrize("shape", FORWARD, ids=str)
def test_forward(shape):
    x = make_inputs(shape, BF16, "cuda")
    check({n: getattr(x, n) for n in ("q", "k", "v", "g", "beta")}, None)


@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_gradients(shape):
    x = make_inputs(shape, BF16, "cuda")
    check({n: getattr(x, n) for n in ("q", "k", "v", "g", "beta")}, x.do)


@pytest.mark.parametrize("K, V", [(128, 128), *WIDTHS], ids=str)
@pytest.mark.parametrize("gates", [1e-3, 1.0, 30.0], ids=["weak", "usual", "strong"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_of_widths(K, V, gates, packed):
    x = make_inputs(Shape(4, 8, 1, 4096, K, V), BF16, "cuda")
    inputs = {n: getattr(x, n) for n in ("q", "k", "v", "g", "beta")}
    inputs["g"] = inputs["g"] * gates
    bounds = torch.tensor([0, 1000, 1000, 1063, 4096], device="cuda") if packed else None
    inputs["initial_state"] = torch.randn(4 if packed else 1, 8, K, V, device="cuda") * 0.1
    check(inputs, x.do, cu_seqlens=bounds)
