"""What is being made of the code that runs."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether it is a program of ``torch.export``. That is what ``torch.compiler.is_exporting`` says, but torch 2.11
    takes it for true under ``torch.compile`` as well."""
    return getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_exporting())
