"""Which device a command runs on, from what the user wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ops.cli.errors import UserError

if TYPE_CHECKING:
    import torch


def pick(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else must be there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device: expected one of this machine's {count} CUDA devices, got {name!r}")
    return device
