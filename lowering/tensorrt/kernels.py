"""Triton kernels with the parameters of a TensorRT plugin: inputs, int32 sizes, outputs, and nothing else.

A quick plugin is one kernel, launched with its input pointers, the extra integers that it declares, and its output
pointers, in this order. TensorRT's tensors are contiguous, so strides are products of sizes; everything that is neither
a pointer nor a dynamic size is a constant of the compiled kernel, floats too. Sizes stay arguments when torch launches
the kernel as well, so that it is the same code: a length of one, which Triton would make a constant, among them.

The recurrent rule and the convolution are the package's own kernels behind such a list of parameters. The chunkwise
rule is those of ``gdn_ops.kernels.triton.chunk_forward`` in one: between its kernels there are buffers, of fp64 among
others, for which TensorRT has neither a type nor a place. So one program owns a (sequence, value head, tile of ``BV``
value columns), carries the ``[K, BV]`` tile of the state, and makes everything of a chunk of ``C`` tokens (32; 16
for wide fp32 keys) by itself::

    A = strict_lower(diag(beta) (K K^T) * D)      M = (I + A)^-1 diag(beta)      P = scale * (Q K^T) * D
    V' = M (V - exp(c) * (K S))                   O = scale * exp(c) * (Q S) + P V'
    S <- exp(c_C) S + K^T (exp(c_C - c) * V')

with ``c`` the cumulative gates (fp64: a strong gate must not cost the digits of the weak ones after it) and
``D_ij = exp(c_i - c_j)``. The inverse grows by doubling, as in ``gdn_ops.lowering.onnx.rule``: with ``X`` that of the
diagonal blocks of size b, ``X - X (A * mask) X`` is that of size 2b. What belongs to a chunk alone is made again for
each tile of columns, and sequences are not cut into segments: with few heads it is slower than the package's own
kernels, which stay what torch runs. Two warps a program keep 16-bit products off Hopper's ``wgmma``, whose traps with
Triton 3.6 docs/kernels.md tells of. Source of the algorithm: arXiv 2412.06464, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from gdn_ops.lowering.tensorrt.declaration import PLUGINS, cdiv
from torch import Tensor

from gdn_ops.kernels.triton.causal_conv1d import AHEAD, UNROLL, causal_conv1d_forward_kernel
from gdn_ops.kernels.triton.intra_chunk import WEAKEST
from gdn_ops.kernels.triton.recurrent import recurrent_forward_kernel

_AHEAD, _UNROLL = tl.constexpr(AHEAD), tl.constexpr(UNROLL)


@triton.jit(do_not_specialize=["B", "T"])
def recurrent_plugin_kernel(
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    B,
    T,
    o,
    final_state,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
):
    """``initial_state`` and ``final_state`` may be one buffer: a program reads its tile before it writes it."""
    row = T.to(tl.int64)
    recurrent_forward_kernel(
        q, k, v, g, beta, o, initial_state, final_state, None, SCALE, T, B,
        row * (H * K), H * K, K, 1,
        row * (H * K), H * K, K, 1,
        row * (HV * V), HV * V, V, 1,
        row * HV, HV, 1,
        row * HV, HV, 1,
        HV * K * V, K * V, V, 1,
        H, HV, K, V, BK, BV, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def conv_plugin_kernel(
    x,
    weight,
    bias,
    initial_state,
    B,
    T,
    y,
    final_state,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    causal_conv1d_forward_kernel(
        x, weight, bias, initial_state, y, final_state, None, T, B,
        T.to(tl.int64) * D, D, 1, W, 1, 1, D * (W - 1), W - 1, 1,
        D, W, SILU, BT, BD, _AHEAD, _UNROLL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def chunk_plugin_kernel(
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    B,
    T,
    o,
    final_state,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
):
    """``C = 2 ** LEVELS``."""
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    hv = program // NV % HV
    n = (program // (NV * HV)).to(tl.int64)
    h = hv // (HV // H)
    rows = tl.arange(0, C)
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    q += n * T * (H * K) + h * K
    k += n * T * (H * K) + h * K
    v += n * T * (HV * V) + hv * V
    o += n * T * (HV * V) + hv * V
    g += n * T * HV + hv
    beta += n * T * HV + hv
    state = (n * HV + hv) * (K * V) + in_k[:, None] * V + in_v[None, :]
    mask_kv = mask_k[:, None] & mask_v[None, :]
    S_kv = tl.load(initial_state + state, mask=mask_kv, other=0.0)
    lower = rows[:, None] >= rows[None, :]
    strict = rows[:, None] > rows[None, :]
    for start in range(0, T, C):
        real = rows < T - start
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        q_ck = tl.load(q + rows[:, None] * (H * K) + in_k[None, :], mask=mask_ck, other=0.0)
        k_ck = tl.load(k + rows[:, None] * (H * K) + in_k[None, :], mask=mask_ck, other=0.0)
        v_cv = tl.load(v + rows[:, None] * (HV * V) + in_v[None, :], mask=mask_cv, other=0.0)
        beta_c = tl.load(beta + rows * HV, mask=real, other=0.0).to(tl.float32)
        g_c = tl.load(g + rows * HV, mask=real, other=0.0).to(tl.float64)
        g_c = tl.where(g_c < WEAKEST, WEAKEST, g_c)
        c = tl.cumsum(g_c, axis=0)
        total = tl.sum(g_c, axis=0)
        D_cc = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
        from_start = tl.exp(c.to(tl.float32))
        to_end = tl.exp((total - c).to(tl.float32))
        whole = tl.exp(total.to(tl.float32))

        kk_cc = tl.dot(k_ck, tl.trans(k_ck), input_precision=PRECISION)
        A_cc = tl.where(strict, kk_cc * D_cc * beta_c[:, None], 0.0)
        X_cc = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
        for level in tl.static_range(LEVELS):
            block_i = rows[:, None] >> level
            block_j = rows[None, :] >> level
            below = (block_i // 2 == block_j // 2) & (block_i > block_j)
            if level == 0:  # the inverse of single rows is one
                X_cc -= tl.where(below, A_cc, 0.0)
            else:
                XA_cc = tl.dot(X_cc, tl.where(below, A_cc, 0.0), input_precision=PRECISION)
                X_cc -= tl.dot(XA_cc, X_cc, input_precision=PRECISION)
        M_cc = (X_cc * beta_c[None, :]).to(k_ck.dtype)

        S_low = S_kv.to(k_ck.dtype)
        stored_cv = tl.dot(k_ck, S_low, input_precision=PRECISION) * from_start[:, None]
        missing_cv = (v_cv.to(tl.float32) - stored_cv).to(k_ck.dtype)
        written_cv = tl.dot(M_cc, missing_cv, input_precision=PRECISION)
        qk_cc = tl.dot(q_ck, tl.trans(k_ck), input_precision=PRECISION)
        P_cc = tl.where(lower, qk_cc * D_cc * SCALE, 0.0).to(k_ck.dtype)
        o_cv = tl.dot(q_ck, S_low, input_precision=PRECISION) * (from_start * SCALE)[:, None]
        o_cv += tl.dot(P_cc, written_cv.to(k_ck.dtype), input_precision=PRECISION)
        tl.store(o + rows[:, None] * (HV * V) + in_v[None, :], o_cv.to(o.dtype.element_ty), mask=mask_cv)
        decayed_cv = (written_cv * to_end[:, None]).to(k_ck.dtype)
        S_kv = S_kv * whole + tl.dot(tl.trans(k_ck), decayed_cv, input_precision=PRECISION)
        q += C * H * K
        k += C * H * K
        v += C * HV * V
        o += C * HV * V
        g += C * HV
        beta += C * HV
    tl.store(final_state + state, S_kv, mask=mask_kv)


def launch(
    name: str, attributes: Mapping[str, Any], *inputs: Tensor, outputs: list[Tensor] | None = None
) -> list[Tensor]:
    """Runs the plugin kernel ``name`` from torch, as it is declared; ``outputs`` are made unless given.

    Tensors must be contiguous, and are what :class:`gdn_ops.lowering.tensorrt.declaration.PluginKernel` says.
    """
    kernel = PLUGINS[name]
    sizes = kernel.bind_sizes([x.shape for x in inputs])
    dtypes = kernel.bind_dtypes([str(x.dtype).removeprefix("torch.") for x in inputs])
    for argument, tensor in zip(kernel.inputs, inputs):
        if not tensor.is_contiguous():
            raise ValueError(f"{argument.name}: expected a contiguous tensor, got strides {tensor.stride()}")
    constants = kernel.constants(sizes, dtypes, attributes)
    if outputs is None:
        outputs = [
            inputs[[x.name for x in kernel.inputs].index(kernel.aliases[x.name])]
            if x.name in kernel.aliases
            else torch.empty(
                [sizes[n] for n in x.shape], dtype=getattr(torch, kernel.dtype_of(x, dtypes)), device=inputs[0].device
            )
            for x in kernel.outputs
        ]
    grid = kernel.grid(sizes, constants, cdiv)
    extras = [sizes[name] for name in kernel.extras]
    kernel.triton()[(grid,)](*inputs, *extras, *outputs, **constants, **kernel.launch(sizes, dtypes))
    return outputs
