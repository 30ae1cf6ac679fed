"""Language modelling on bytes, and perplexity against position for length extrapolation.

The text is the source of Python's own standard library, which every machine has (``gdn_ops.cli.corpus``): about 10 MB
in an order that mixes the packages, the tail of it held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gdn_ops.cli import corpus
from perf.claims.tasks import Batch

HELD_OUT = 0.1


@cache
def _bytes() -> corpus.Tokens:
    files = corpus.in_order(corpus.standard_library())
    everything = np.frombuffer(b"\0".join(file.path.read_bytes() for file in files), dtype=np.uint8)
    return corpus.split(everything, HELD_OUT, 1)


@dataclass(frozen=True)
class Text:
    """Windows of ``length`` bytes; read at ``settings``, positions up to which a window of the longest is scored."""

    length: int
    settings: tuple[int, ...]
    vocab_size: int = 256

    @property
    def name(self) -> str:
        return "text"

    def batch(self, seed: int, step: int, size: int, setting: int | None = None) -> Batch:
        """With ``setting``, windows of the held-out text of that length, spread evenly, the same for every seed."""
        if setting is None:
            window = _bytes().train[:]
            starts = np.random.default_rng([seed, step]).integers(0, len(window) - self.length - 1, size=size)
            length = self.length
        else:
            window, length = _bytes().held_out, setting
            starts = np.linspace(0, len(window) - length - 1, size).astype(np.int64)
        ids = torch.from_numpy(np.stack([window[i : i + length + 1] for i in starts]).astype(np.int64))
        return Batch(ids[:, :-1], ids[:, 1:].clone())

    def buckets(self) -> list[tuple[int, int]]:
        """Neighbouring ranges of positions that end at the settings."""
        return list(zip((0, *self.settings[:-1]), self.settings))


def perplexity(nats: float) -> float:
    """Of a byte; ``inf`` beyond what a float holds."""
    return math.exp(nats) if nats < 700 else math.inf
