"""How a Triton kernel is started: directly, or as a node of the graph while a compiler is tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_traced: ContextVar[bool] = ContextVar("gdn_ops_traced", default=False)


@contextmanager
def traced() -> Iterator[None]:
    """Inside, :func:`launch` records kernels as ``triton_kernel_wrapper`` nodes, which Inductor can schedule, capture
    in CUDA graphs and pack as cubins. The operators' rule for functionalisation is the one caller."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


def is_traced() -> bool:
    """Whether a compiler is recording: then only what :func:`launch` can record may run."""
    return _traced.get()


def launch(kernel):
    """``launch(kernel)[grid](...)`` runs the kernel now, or puts it into the graph inside :func:`traced`."""
    return torch.library.wrap_triton(kernel) if _traced.get() else kernel
