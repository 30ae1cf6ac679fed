"""How much memory a call takes on CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def with_memory(call: Callable[[], Result]) -> tuple[Result, int]:
    """What ``call`` gives, and the most bytes on the way there, beyond what was there before."""
    gc.collect()  # what dies meanwhile would count as if it had not been there
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return result, torch.cuda.max_memory_allocated() - before
