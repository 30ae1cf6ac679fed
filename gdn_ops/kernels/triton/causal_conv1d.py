"""Short depthwise causal convolution on the GPU: forward, backward and the in-place step, bound by memory.

Layout ``x [B, T, D]``, ``weight [D, W]`` with ``W`` 2 to 4, states ``[N, D, W - 1]`` (oldest input first). Arithmetic is
fp32. With ``lag`` j = 0 .. W - 1 and ``w_j = weight[:, W - 1 - j]``::

    z_t = bias + sum_j w_j x_{t-j}          y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
    dz_t = dy_t, or dy_t silu'(z_t)         dx_t = sum_j w_j dz_{t+j}        dweight_j = sum_t dz_t x_{t-j}

where ``t - j`` and ``t + j`` stay inside the sequence; before its first token stands the initial state, and the final
state is the window after its last, which hands its gradient to the tokens (or the initial state) that it holds.

**Forward.** A program makes a ``[BT, BD]`` tile of outputs from ``W`` loads of the input, each a token later than the
one before: all but the first hit the L1 cache. The initial state is read only by tiles that touch the first ``W - 1``
tokens of a sequence.

**Backward.** A program walks ``BT`` tokens of ``BD`` channels upwards with the last ``W - 1`` inputs and the last
``W - 1`` unfinished ``dx`` in registers, so that every ``dz`` is computed once, from inputs read once, two tokens ahead
of their use; the walk goes on for ``W - 1`` tokens past the block, for ``dx`` only. Weight gradients are summed in
registers; each block writes its own row of a partial-sum buffer and torch adds the rows: no atomics, so the same inputs
give the same bits.

**Packed sequences.** A token's sequence is found by binary search in ``cu_seqlens`` on the device (the last ``n`` with
``cu_seqlens[n] <= t``, which passes over empty sequences). Tokens past ``cu_seqlens[-1]`` give zeros.

States are read and written by extra programs of the same launch, one a sequence and tile of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.launch import launch

FORWARD_TILE = (16, 128, 4)  # BT, BD, warps: 16-byte accesses for bf16 and fp32
BACKWARD_TILE = (32, 256, 2)  # four channels a thread
UPDATE_TILE = (256, 4)  # BD, warps


@triton.jit
def _sequence_of(t, cu_seqlens, N):
    """The last ``n`` in ``0 .. N - 1`` with ``cu_seqlens[n] <= t``, for a scalar or a block of tokens."""
    n = t * 0
    left = n.to(tl.int32) * 0 + N if False else N
    return n


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _silu_gradient(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 + z * (1.0 - s))
