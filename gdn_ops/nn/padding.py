"""Rows of unequal length in one batch.

Both mixers are causal, so padding on the *right* of a row never reaches a real token; only the states must be taken at
the row's own end. Any other mask is brought to that form: real tokens move to the left in order, and results move back.
With the same code for both, left padding gives exactly what the unpadded rows give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.validation import check_cu_seqlens, has_values, is_autocast

LENGTHS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch promotes no other integers


class Padding(NamedTuple):
    """``slot [B, T]``: where each token stands once the real ones are on the left; ``order`` its inverse; ``lengths``
    ``[B]``: how many are real. All int64."""

    slot: Tensor
    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> Padding:
        """From a mask ``[B, T]``, true or nonzero for real tokens.

        Example::

            >>> Padding.of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).lengths
            tensor([2, 3])
        """
        real = attention_mask != 0
        rank_real, rank_padding = real.long().cumsum(1), (~real).long().cumsum(1)
        lengths = real.long().sum(1)
        slot = torch.where(real, rank_real - 1, lengths[:, None] + rank_padding - 1)
        token = torch.arange(real.shape[1], device=real.device).expand_as(slot)
        return cls(slot, torch.zeros_like(slot).scatter(1, slot, token), lengths)

    def compact(self, x: Tensor) -> Tensor:
        """``x [B, T, ...]`` with the real tokens of each row on the left."""
        return _pick(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`compact`."""
        return _pick(x, self.slot)

    def last(self, x: Tensor) -> Tensor:
        """Of compact ``x [B, T, ...]`` each row's last real token, ``[B, 1, ...]``; the first if there is none."""
        return _pick(x, (self.lengths - 1).clamp(min=0)[:, None])


def real_tokens(lengths: Tensor, T: int) -> Tensor:
    """``[B, T]``, true for the first ``lengths`` tokens of a row."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def check_hidden_states(x: Tensor, hidden_size: int, weight: Tensor | None) -> None:
    """ValueError or TypeError unless ``x`` is ``[B, T, hidden_size]`` and fits the projection by ``weight``, if known.

    Under autocast the projection takes any floating dtype; elsewhere its own.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"hidden_states: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != hidden_size:
        raise ValueError(f"hidden_states: expected shape [B, T, {hidden_size}], got {tuple(x.shape)}")
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(f"hidden_states: expected device {weight.device} (as the weights), got {x.device}")
    if x.dtype != weight.dtype and not is_autocast(x):
        raise TypeError(f"hidden_states: expected dtype {weight.dtype} (as the weights), got {x.dtype}")


def check_rows(rows: Tensor, name_of_rows: str, attention_mask, lengths, cu_seqlens) -> None:
    """ValueError or TypeError unless at most one of the three is given and fits ``rows [B, T, ...]``."""
    B, T = rows.shape[:2]
    given = {"attention_mask": attention_mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
    names = [name for name, x in given.items() if x is not None]
    if len(names) > 1:
        raise ValueError(f"{names[0]}: expected None together with {names[1]}, got both")
    for name, shape in (("attention_mask", (B, T)), ("lengths", (B,))):
        x = given[name]
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != len(shape) or any(a != b for a, b in zip(x.shape, shape)):
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
        if x.is_complex() or (name == "lengths" and x.dtype not in LENGTHS):
            raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")
        if x.device != rows.device:
            raise ValueError(f"{name}: expected device {rows.device}, got {x.device}")
    if lengths is not None and has_values(lengths):
        lengths = lengths.long()  # T may be more than a narrower dtype holds
        wrong = lengths[(lengths < 0) | (lengths > T)]
        if wrong.numel():
            raise ValueError(f"lengths: expected numbers of tokens in [0, {T}], got {int(wrong[0])}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rows, name_of_rows)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *(1 for _ in x.shape[2:]))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))
