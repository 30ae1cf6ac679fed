"""Gradients at full size on the GPU against fp64: some compilers miscompile such backward kernels only there."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from gdn_ops.kernels.cpu import gated_delta_rule, gated_linear_attention
from perf.shapes import BACKWARD, FORWARD, Shape, make_inputs
from tests.oracle import GRADIENTS, assert_all_close, cotangents, make_inputs_of, run_with_gradients

FUNCTIONS = {"delta": gdn_ops.chunk_gated_delta_rule, "linear": gdn_ops.chunk_gated_linear_attention}
both_rules = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
SHAPES = {"1x8192_16/32_D128": (1, 8192, 16, 32, 128), "8x2048_8/8_D256": (8, 2048, 8, 8, 256)}


def exact(inputs, do, ds):
    """Values and gradients in fp64 by the plain chunkwise kernel, a row and a key head at a time to bound memory.

    The plain kernel itself is held to the specification in ``test_gated_delta_rule.py``.
    """
    q, v, cu_seqlens = inputs["q"], inputs["v"], inputs["cu_seqlens"]
    plain = gated_delta_rule if "beta" in inputs else gated_linear_attention
    names = [n for n in GRADIENTS if inputs.get(n) is not None]
    no_state = [None] * (inputs["initial_state"] is None)
    (B, _, H, K), group = q.shape, v.shape[2] // q.shape[2]
    results = {n: torch.empty_like(t, dtype=torch.float64) for n, t in (("o", v), ("final_state", ds))}
    results.update({"d" + n: torch.empty_like(inputs[n], dtype=torch.float64) for n in names})
    for b in range(B):
        for h in range(H):
            key, values = slice(h, h + 1), slice(h * group, (h + 1) * group)
            rows, states = slice(b, b + 1), slice(None) if cu_seqlens is not None else slice(b, b + 1)
            where = {n: (rows, slice(None), key if n in ("dq", "dk") else values) for n in results}
            where.update(final_state=(states, values), dinitial_state=(states, values))
            x = [inputs[n][where["d" + n]].double() for n in names] + no_state
            some = plain.chunk_forward(*x, cu_seqlens, K**-0.5, True)
            grads = plain.chunk_backward(
                do[where["o"]].double(), ds[where["final_state"]].double(), *x, cu_seqlens, K**-0.5
            )
            for n, part in zip(("o", "final_state", *("d" + n for n in names)), (*some, *grads)):
                results[n][where[n]] = part
    return results


@pytest.mark.gpu
@both_rules
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_full_size(function, shape, dtype):
    B, T, H, HV, D = shape
    x = make_inputs_of(function, B, T, H, HV, D, D, dtype, "cuda", initial_state=True)
    do, ds = cotangents(x)
    assert_all_close(run_with_gradients(function, x, do, ds), exact(x, do, ds), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_full_size_of_mamba2(dtype):
    """One key head for all value heads, wide keys and narrow values; a batch of 1 is cut into segments, 4 are not."""
    function = gdn_ops.chunk_gated_linear_attention
    for B in (1, 4):
        x = make_inputs_of(function, B, 4096, 1, 12, 128, 64, dtype, "cuda", initial_state=True)
        do, ds = cotangents(x)
        got = run_with_gradients(function, x, do, ds)
        assert_all_close(got, exact(x, do, ds), dtype)


@pytest.mark.gpu
@both_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_full_size_packed(function, dtype):
    bounds = [0, 1, 1000, 1000, 1064, 4096, 8191, 8192]
    x = make_inputs_of(function, 1, 8192, 4, 8, 128, 128, dtype, "cuda", initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    assert_all_close(run_with_gradients(function, x, do, ds), exact(x, do, ds), dtype)


def check_at(shape: Shape, gates: float = 1.0, bounds: list[int] | None = None, state: bool = False) -> None:
    """Values and gradients in bf16 on the benchmarks' inputs."""
    made = make_inputs(shape, torch.bfloat16, "cuda")
    x = {n: getattr(made, n) for n in ("q", "k", "v", "g", "beta")}
    x["g"] = x["g"] * gates
    x["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device="cuda")
    ds = torch.randn(shape.N if bounds is None else len(bounds) - 1, shape.HV, shape.K, shape.V, device="cuda")
    x["initial_state"] = torch.randn_like(ds) if state else None
    got = run_with_gradients(FUNCTIONS["delta"], x, made.do, ds)
    assert_all_close(got, exact(x, made.do, ds), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", dict.fromkeys([*FORWARD, *BACKWARD]), ids=str)
def test_shapes_of_the_benchmarks(shape):
    check_at(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("K, V", [(128, 128), (128, 256), (192, 384), (256, 256), (256, 512)])
@pytest.mark.parametrize("gates", [1e-3, 30.0], ids=["weak gates", "strong gates"])
@pytest.mark.parametrize("bounds", [None, [0, 1000, 1000, 1063, 4096]], ids=["dense", "packed"])
def test_widths(K, V, gates, bounds):
    check_at(Shape(4, 8, 1, 4096, K, V), gates, bounds, state=True)


@pytest.mark.gpu
def test_offsets_past_two_to_the_thirty_first():
    """The last rows of a tensor with more than 2**31 elements are computed from the last rows."""
    T, V = 2**22 + 64, 512
    g = torch.full((1, T, 1), -0.1, device="cuda")
    q = torch.nn.functional.normalize(torch.randn(1, T, 1, 16, device="cuda"), dim=-1).bfloat16()
    v = torch.randn(1, T, 1, V, device="cuda", dtype=torch.bfloat16)
    o, state = gdn_ops.chunk_gated_delta_rule(q, q, v, g, g.neg(), output_final_state=True)
    tail = [t[:, -1024:].double() for t in (q, q, v, g, g.neg())]
    want, want_state = gated_delta_rule.chunk_forward(*tail, None, None, 0.25, True)
    assert o.numel() > 2**31
    assert_all_close({"o": o[:, -64:], "final_state": state}, {"o": want[:, -64:], "final_state": want_state}, q.dtype)


@both_rules
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 70]], ids=["dense", "packed"])
def test_the_sliced_oracle_is_the_oracle(function, cu_seqlens):
    """What the tests above compare with, on a small input against the specification."""
    from tests.oracle import expected

    B = 1 if cu_seqlens else 2
    x = make_inputs_of(function, B, 70, 2, 4, 16, 24, torch.float64, initial_state=True, cu_seqlens=cu_seqlens)
    do, ds = cotangents(x)
    assert_all_close(exact(x, do, ds), expected(x, do=do, ds=ds), torch.float64)
