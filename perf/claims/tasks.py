"""Synthetic tasks: batches of tokens and targets, a function of ``(seed, step)`` alone.

``targets[b, t]`` is what the logits *at* position t are scored on, or ``IGNORED``. A task's ``settings`` are what a
trained model is read at: numbers of keys, or lengths.

``Recall``  multi-query associative recall (arXiv 2312.04927, section 4): pairs of key and value, then every key once,
            at places drawn at random among fillers; the model gives the value right after its key.
``Needle``  single needle in a haystack after RULER's S-NIAH-1, 2, 3 (arXiv 2404.06654): a mark, a key and a value
            somewhere in a long text, and at its end the mark and the key again. Variant 1 has a haystack that repeats
            itself and short values: memory. Variant 2 has a haystack of random text, keys and values among its tokens:
            filtering. Variant 3 has values four times as long: remembering.
``Parity``  of the bits so far, at every position; read at lengths beyond those of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


class Batch(NamedTuple):
    """``ids, targets [B, T]`` int64; ``answers`` scored tokens in a row belong to one answer."""

    ids: Tensor
    targets: Tensor
    answers: int = 1


def _tensors(ids: np.ndarray, targets: np.ndarray, answers: int = 1) -> Batch:
    return Batch(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)), answers)


@dataclass(frozen=True)
class Recall:
    """``keys`` pairs in ``length`` tokens; half of the vocabulary beside the filler 0 are keys, half values."""

    length: int
    keys: int
    settings: tuple[int, ...]
    vocab_size: int = 512

    @property
    def name(self) -> str:
        return "recall"

    def batch(self, seed: int, step: int, size: int, setting: int | None = None) -> Batch:
        """``setting`` is another number of keys; in training each row has its own, up to ``keys``."""
        rng = np.random.default_rng([seed, step])
        most, half = setting or self.keys, (self.vocab_size - 1) // 2
        if 4 * most > self.length or most > half:
            raise ValueError(f"setting: expected at most {min(self.length // 4, half)} keys, got {most}")
        ids, targets = np.zeros((size, self.length)), np.full((size, self.length), IGNORED)
        for row in range(size):
            n = setting or int(rng.integers(max(1, most // 8), most + 1))
            keys = 1 + rng.permutation(half)[:n]
            values = 1 + half + rng.integers(half, size=n)
            ids[row, : 2 * n : 2], ids[row, 1 : 2 * n : 2] = keys, values
            order = rng.permutation(n)
            # Pairs of places, so that a value (which is not shown) has room after its key.
            places = 2 * n + 2 * np.sort(rng.permutation((self.length - 2 * n) // 2)[:n])
            ids[row, places], targets[row, places] = keys[order], values[order]
        return _tensors(ids, targets)


@dataclass(frozen=True)
class Needle:
    """Variant 1, 2 or 3 at ``length`` tokens. Tokens: 0 mark, 1 to 16 digits, then keys, then words."""

    variant: int
    length: int
    settings: tuple[int, ...]
    vocab_size: int = 256

    KEYS = 16

    @property
    def name(self) -> str:
        return f"needle-{self.variant}"

    @property
    def value_length(self) -> int:
        return 8 if self.variant == 3 else 2

    def batch(self, seed: int, step: int, size: int, setting: int | None = None) -> Batch:
        """``setting`` is another length. In training there are several needles, all asked for (one answer a sequence is
        little to learn from), and haystacks of all lengths, behind a beginning that is one word over and over."""
        rng, T, V = np.random.default_rng([seed, step]), setting or self.length, self.value_length
        words, block = 17 + self.KEYS, V + 2
        if 4 * block > T:
            raise ValueError(f"setting: expected a length of at least {4 * block}, got {T}")
        n = 1 if setting else min(8, T // (4 * block))
        if self.variant == 1:
            ids = np.tile(words + np.arange(T) % 16, (size, 1))
        else:
            ids = rng.integers(1, self.vocab_size, size=(size, T))
        targets, haystack = np.full((size, T), IGNORED), T - n * block + 1
        least = n * block
        before = 0 if setting else int(rng.integers(0, haystack - least + 1))
        ids[:, :before], room = self.vocab_size - 1, haystack - before
        for row in range(size):
            keys, values = 17 + rng.permutation(self.KEYS)[:n], 1 + rng.integers(16, size=(n, V))
            needles = np.concatenate([np.zeros((n, 1)), keys[:, None], values], axis=1)
            shift = before + rng.integers(room % block + 1)
            for needle, slot in zip(needles, rng.permutation(room // block)[:n]):
                ids[row, shift + slot * block :][:block] = needle
            order = rng.permutation(n)
            asked = needles[order].flatten()[:-1]  # the last token of the last answer is not shown
            ids[row, haystack:] = asked
            for i, which in enumerate(order):
                targets[row, haystack + i * block + 1 :][:V] = values[which]
        return _tensors(ids, targets, V)


@dataclass(frozen=True)
class Parity:
    """Bits 0 and 1; the target at t is the sum of the bits up to t, modulo 2."""

    length: int
    settings: tuple[int, ...]
    vocab_size: int = 4

    @property
    def name(self) -> str:
        return "parity"

    def batch(self, seed: int, step: int, size: int, setting: int | None = None) -> Batch:
        """``setting`` is another length, whose second half is scored; in training each batch has its own length."""
        rng = np.random.default_rng([seed, step])
        T = setting or int(rng.integers(max(2, self.length // 8), self.length + 1))
        ids = rng.integers(0, 2, size=(size, T))
        targets = ids.cumsum(1) % 2
        if setting is not None:
            targets[:, : T // 2] = IGNORED
        return _tensors(ids, targets)
