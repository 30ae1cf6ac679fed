"""Root-mean-square normalisation, plain and gated.

Written in pointwise torch, so that a compiler fuses it and an exporter needs no special node. Sums run in fp32 (fp64
for fp64 inputs); the result has the input's dtype, under autocast too, where the weight is wider than the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn_ops.kernels.cpu.chunks import compute_dtype


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, ``size`` long; any float dtype.

    Example::

        >>> RMSNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight of ones."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def _wide(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._wide(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * silu(z)``: how a mixer's heads are gated (arXiv 2412.06464, section 3.4).

    ``x`` and ``z`` have one shape, ``[..., heads, size]``; the weight is shared by the heads.

    Example::

        >>> x, z = torch.randn(2, 1, 5, 4, 8)
        >>> GatedRMSNorm(8)(x, z).shape
        torch.Size([1, 5, 4, 8])
    """

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (self._wide(x) * F.silu(z.to(compute_dtype(z)))).to(x.dtype)


class GatedGroupRMSNorm(RMSNorm):
    """``RMSNorm(x * silu(z))`` over ``groups`` equal parts of the last dimension apart: Mamba2's (arXiv 2405.21060).

    ``x`` and ``z`` have one shape, ``[..., size]``; the result has z's dtype, ``x`` may be wider.

    Example::

        >>> x, z = torch.randn(2, 1, 5, 32)
        >>> GatedGroupRMSNorm(32, groups=4)(x, z).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, size: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__(size, eps)
        if groups < 1 or size % groups:
            raise ValueError(f"groups: expected a divisor of size={size}, got {groups}")
        self.groups = groups

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        wide = compute_dtype(x)
        x = (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x.flatten(-2) * self.weight).to(z.dtype)
