"""Rows of unequal length, in the layouts that a padded batch may have."""

from __future__ import annotations

import torch
from torch import Tensor

# Where two ways of computing must agree: fp64 on the CPU; on CUDA fp32, because fp64 would not reach the kernels.
AGREEMENT = {"cpu": (torch.float64, 1e-11), "cuda": (torch.float32, 3e-5)}
LENGTHS = (9, 70, 1, 33)
LAYOUTS = ("left", "right", "middle")


def rows(width: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """``[1, length, width]`` for each of ``LENGTHS``."""
    generator = torch.Generator().manual_seed(seed)
    normal = (torch.randn(1, n, width, generator=generator, dtype=torch.float64) for n in LENGTHS)
    return [x.to(device, dtype) for x in normal]


def mask(layout: str, T: int = 72, device: str = "cpu") -> Tensor:
    """``[B, T]`` of 0 and 1 with ``LENGTHS`` ones; ``middle`` scatters them."""
    generator = torch.Generator().manual_seed(7)
    result = torch.zeros(len(LENGTHS), T, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        places = {"left": slice(T - n, T), "right": slice(0, n), "middle": torch.randperm(T, generator=generator)[:n]}
        result[row, places[layout]] = 1
    return result.to(device)


def padded(x: list[Tensor], attention_mask: Tensor) -> Tensor:
    """The rows at the mask's ones and large numbers, which must not matter, elsewhere."""
    batch = torch.full((*attention_mask.shape, *x[0].shape[2:]), 100, dtype=x[0].dtype, device=x[0].device)
    for row, tokens in enumerate(x):
        batch[row, attention_mask[row] == 1] = tokens[0]
    return batch
