"""Rotary position embedding (arXiv 2104.09864), the two halves of a head as the pairs' coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.kernels.cpu.chunks import compute_dtype
from gdn_ops.nn.tracing import is_exporting


def rotate(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotates feature pair ``(i, i + D/2)`` of ``x [B, T, H, D]`` by ``position * theta ** (-2 i / D)``.

    ``position [B, T]`` (or ``[1, T]``) is int64 and D is even. Angles are computed in fp32 (fp64 for fp64 inputs): bf16
    would confuse neighbours from position 256 on. The result has x's dtype. ValueError for another rank or an odd D.

    Example::

        >>> x = torch.ones(1, 1, 1, 2)
        >>> rotate(x, torch.tensor([[0]])), rotate(x, torch.tensor([[1]]))[0, 0, 0]
        (tensor([[[[1., 1.]]]]), tensor([-0.3012,  1.3818]))
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected [B, T, H, D] with an even D, got {tuple(x.shape)}")
    D, dtype = x.shape[-1], compute_dtype(x)
    feature = torch.arange(D, device=x.device)
    frequency = theta ** (-2 * (feature % (D // 2)).to(dtype) / D)
    frequency = torch.where(feature < D // 2, -frequency, frequency)  # a pair's sines have opposite signs
    angle = (position.to(dtype)[..., None] * frequency)[:, :, None, :]
    cos, sin = _stored(torch.stack([angle.cos(), angle.sin()]))
    x_wide = x.to(dtype)
    return (x_wide * cos + x_wide.roll(D // 2, -1) * sin).to(x.dtype)


def _stored(x: Tensor) -> Tensor:
    """``x``, in memory. Inductor would fuse sines and powers into all that multiplies by them, and compute them again
    for every head of every layer, which takes ten times as long; ``as_strided`` is of what lies in memory."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() and not is_exporting() else x
