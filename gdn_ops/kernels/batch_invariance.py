"""The switch that makes a sequence's bits independent of what shares its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, kernels do not choose how to divide the work by the shape of the batch.

    Outside, a scan over few heads and sequences is cut into segments so that it fills the GPU (``segments.py``). That
    rounds differently from a scan of whole sequences: the same prompt may give other bits alone than in a batch.
    Inside, sequences stay whole, at some loss of speed for small batches. The switch belongs to the process (the
    backward pass runs in threads of its own); it is read when a kernel is launched or, under a compiler, when a graph
    is traced.

    Example::

        >>> q = k = torch.nn.functional.normalize(torch.randn(2, 70, 1, 16), dim=-1)
        >>> v, g, beta = torch.randn(2, 70, 1, 16), -torch.rand(2, 70, 1), torch.rand(2, 70, 1)
        >>> with batch_invariant():
        ...     both, _ = gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta)
        ...     alone, _ = gdn_ops.chunk_gated_delta_rule(*(x[:1] for x in (q, k, v, g, beta)))
        >>> torch.equal(both[:1], alone)
        True
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_batch_invariant() -> bool:
    """Whether a :func:`batch_invariant` block is open."""
    return _depth > 0
