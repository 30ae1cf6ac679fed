"""Who is timed on gated linear attention, Mamba2's rule: gdn_ops, and where they are installed FLA's simple GLA and
mamba-ssm's Triton kernels.

FLA's takes no grouped values: it gets q and k repeated to the value heads, which is not timed. mamba-ssm's decays by
``exp(dt A)`` and writes ``dt x``: it gets ``A = -1``, ``dt = -g`` and ``x = v / dt``, which is not timed either.
"""

from __future__ import annotations

import importlib

import torch

import gdn_ops
from perf.clocks import Call
from perf.providers import OURS, Provider, Unavailable, by_autograd, no_grad
from perf.shapes import CHUNK, Cost, Inputs, Shape

# Mamba2 at 130M, 1.3B and 2.7B: one group of keys, heads of 64 values; and the paper's H2.
SHAPES = (
    Shape(1, 24, 1, 8192, 128, 64), Shape(1, 64, 1, 8192, 128, 64), Shape(1, 80, 4, 8192, 128, 64),
    Shape(1, 72, 1, 32768, 128, 64), Shape(16, 32, 1, 8192),
)  # fmt: skip
DECODE = (Shape(1, 64, 64, 1, 128, 64), Shape(1, 64, 1, 1, 128, 64))
TASKS = [(shape, d) for shape in SHAPES for d in ("forward", "backward")] + [(shape, "decode") for shape in DECODE]


def cost(shape: Shape, direction: str, dtype: torch.dtype) -> Cost:
    """As :func:`perf.shapes.cost`: the least traffic, and the products of the chunk form without the delta."""
    H, HV, N, T, K, V = shape
    tokens, size = N * T, dtype.itemsize
    inputs, outputs = tokens * (2 * H * K + HV * V) * size, tokens * HV * V * size
    forward = 2 * tokens * (CHUNK * H * K + HV * (CHUNK * V + 2 * K * V))
    backward = 2 * tokens * (3 * CHUNK * H * K + HV * (2 * CHUNK * V + 5 * K * V))
    if direction == "decode":
        return Cost(inputs + outputs + 2 * N * HV * K * V * 4, 4 * tokens * HV * K * V)
    if direction == "forward":
        return Cost(inputs + outputs, forward)
    if direction == "backward":
        return Cost(2 * inputs + outputs, backward)
    if direction == "forward+backward":
        return Cost(3 * inputs + 2 * outputs, forward + backward)
    raise ValueError(f"direction: expected forward, backward, forward+backward or decode, got {direction!r}")


def _gdn_ops(x: Inputs, direction: str) -> Call:
    op, tensors = torch.ops.gdn, (x.q, x.k, x.v, x.g)

    def forward():
        return op.chunk_gated_linear_attention(*tensors, None, None, x.scale, False)

    def backward():
        return op.chunk_gated_linear_attention_backward(x.do, None, *tensors, None, None, x.scale)

    def both():
        forward()
        return backward()

    def decode():
        return op.recurrent_gated_linear_attention(*tensors, x.state, None, x.scale, True)

    calls = {"forward": forward, "backward": backward, "forward+backward": both, "decode": decode}
    return no_grad(calls[direction])


def _fla(x: Inputs, direction: str) -> Call:
    public = importlib.import_module("fla.ops.simple_gla")
    group = x.v.shape[2] // x.q.shape[2]
    q, k = (t.repeat_interleave(group, dim=2) for t in (x.q, x.k))
    if direction == "decode":
        recurrent = public.fused_recurrent_simple_gla
        return no_grad(lambda: recurrent(q, k, x.v, x.g, scale=x.scale, initial_state=x.state, output_final_state=True))
    if direction == "forward":
        return no_grad(lambda: public.chunk_simple_gla(q, k, x.v, x.g, scale=x.scale))
    call = by_autograd(public.chunk_simple_gla, x, direction, (q, k, x.v, x.g))

    def run():
        dq, *rest = call()
        return dq.unflatten(2, (-1, group)).sum(3), *rest

    return run


def _mamba_ssm(x: Inputs, direction: str) -> Call:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    if direction == "decode":
        raise Unavailable("mamba-ssm is timed on chunks only")
    dt, A = -x.g, -torch.ones(x.v.shape[2], device=x.v.device)
    written = (x.v / dt[..., None]).to(x.v.dtype)

    def rule(q, k, written, dt, scale):
        return (scan(written, dt, A, k, q * scale, chunk_size=256),)  # the chunk of its own Mamba2

    tensors = (x.q, x.k, written, dt)
    if direction == "forward":
        return no_grad(lambda: rule(*tensors, x.scale))
    return by_autograd(rule, x, direction, tensors)


def forward_and_backward(x: Inputs) -> Call:
    """As :func:`perf.providers.forward_and_backward`."""
    return by_autograd(gdn_ops.chunk_gated_linear_attention, x, "forward+backward", (x.q, x.k, x.v, x.g))


LINEAR_PROVIDERS = {
    p.name: p
    for p in (
        Provider(OURS, _gdn_ops),
        Provider("FLA simple GLA", _fla, ("fla.ops.simple_gla", "flash-linear-attention")),
        Provider("mamba-ssm", _mamba_ssm, ("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm")),
    )
}
