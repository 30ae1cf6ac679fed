"""Rotary position embedding (arXiv 2104.09864), the two halves of a head as the pairs' coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.ops.gated_delta_rule import state_dtype


def rotate(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotates feature pair ``(i, i + D/2)`` of ``x [B, T, H, D]`` by ``position * theta ** (-2 i / D)``.

    ``position [B, T]`` (or ``[1, T]``) is int64 and D is even. Angles are computed in fp32 (fp64 for fp64 inputs): bf16
    would confuse neighbours from position 256 on. The result has x's dtype.

    Example::

        >>> x = torch.ones(1, 1, 1, 2)
        >>> rotate(x, torch.tensor([[0]])), rotate(x, torch.tensor([[1]]))[0, 0, 0]
        (tensor([[[[1., 1.]]]]), tensor([-0.3012,  1.3818]))
    """
    D, dtype = x.shape[-1], state_dtype(x)
    frequency = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)
    angle = (position.to(dtype)[..., None] * frequency)[:, :, None, :]
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
