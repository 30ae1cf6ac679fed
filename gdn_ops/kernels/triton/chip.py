"""What a launch has to know of its chip: how much shared memory a block may have, and how many blocks run at once.

It is the chip that holds the tensors. Inside :func:`as_if_on` it is another one, so that kernels can be built for chips
that are not there with the tiles that the launchers would choose on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Chip(NamedTuple):
    """``backend`` ("cuda" or "hip") and ``arch`` as Triton names them, bytes of shared memory, multiprocessors."""

    backend: str
    arch: int | str
    shared_memory: int
    multiprocessors: int

    @property
    def large(self) -> bool:
        """Whether blocks may have 200 kB of shared memory, and products are a warpgroup's (sm_90, sm_100)."""
        return self.shared_memory > 200_000


CHIPS = {
    "sm_80": Chip("cuda", 80, 166912, 108),
    "sm_90": Chip("cuda", 90, 232448, 132),
    "sm_100": Chip("cuda", 100, 232448, 148),
    "sm_120": Chip("cuda", 120, 101376, 188),
    "gfx942": Chip("hip", "gfx942", 65536, 304),
}

_named: ContextVar[Chip | None] = ContextVar("gdn_ops_chip", default=None)


@contextmanager
def as_if_on(chip: Chip) -> Iterator[None]:
    """Inside, :func:`chip_of` answers ``chip`` whatever it is asked."""
    token = _named.set(chip)
    try:
        yield
    finally:
        _named.reset(token)


def chip_of(x: Tensor) -> Chip:
    """The chip that holds ``x``; an H200 for tensors that no GPU holds (interpreted, or without storage)."""
    named = _named.get()
    if named is not None:
        return named
    return _chip(x.device) if x.device.type == "cuda" else CHIPS["sm_90"]


@cache
def _chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # ROCm builds of torch need not have the "optin" property; 64 KiB is what every CDNA and RDNA chip has.
        arch = properties.gcnArchName.split(":")[0]
        return Chip("hip", arch, CHIPS["gfx942"].shared_memory, properties.multi_processor_count)
    arch = properties.major * 10 + properties.minor
    return Chip("cuda", arch, properties.shared_memory_per_block_optin, properties.multi_processor_count)
