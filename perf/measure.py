"""Interleaved measurement: everything compared takes its turn in every round, so that a drifting clock or a busy
neighbour hits all alike. Also what the machine itself can do, measured in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from perf.clocks import Call, EventClock, GraphClock, WallClock
from perf.shapes import Cost


class Candidate(NamedTuple):
    """One provider's calls, one for each set of inputs."""

    provider: str
    calls: Sequence[Call]


class Quantiles(NamedTuple):
    """Of the samples, in milliseconds a call."""

    p20: float
    p50: float
    p80: float
    least: float
    samples: int


class Measurement(NamedTuple):
    provider: str
    times: Quantiles | None
    method: str
    note: str


class Ceilings(NamedTuple):
    """What a copy and a matrix product reach on this device: bytes (read and written) and FLOPs a second."""

    copy: float
    matmul: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """20th, 50th and 80th percentile, linear between neighbours as numpy has it."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Quantiles(at(0.2), at(0.5), at(0.8), ordered[0], len(ordered))


def describe(error: BaseException) -> str:
    """Type and first line, short enough for a cell of the CSV."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def interleave(
    candidates: Sequence[Candidate],
    clocks: Sequence[EventClock | WallClock],
    seconds: float,
    repeats: int = 1,
    most: int = 200,
    warm: int = 2,
) -> list[Measurement]:
    """Measures ``candidates`` in turns for about ``seconds``: at most ``most`` rounds and at least one, after ``warm``
    that do not count.

    Each uses the first of ``clocks`` that can prepare it; why an earlier one could not is noted. One that none can
    prepare, or that fails later, gives a measurement without times and with its error as the note.
    """
    samplers, methods, notes = {}, {}, {c.provider: "" for c in candidates}
    for candidate in candidates:
        for clock in clocks:
            try:
                samplers[candidate.provider] = clock.prepare(candidate.calls, repeats)
                methods[candidate.provider] = clock.method
                break
            except Exception as error:  # a peer that fails must not end the run; its row says why
                notes[candidate.provider] = f"no {clock.method}: {describe(error)}"
    samples: dict[str, list] = {provider: [] for provider in samplers}
    end, rounds = time.perf_counter() + seconds, -warm
    while samplers and rounds < most and (rounds < 1 or time.perf_counter() < end):
        for provider, sample in list(samplers.items()):
            try:
                samples[provider].append(sample())
            except Exception as error:
                notes[provider] = describe(error)
                del samplers[provider], samples[provider]
        for clock in clocks:
            clock.finish()
        rounds += 1
    return [
        Measurement(
            c.provider,
            quantiles([read() for read in samples[c.provider][warm:]]) if c.provider in samples else None,
            methods.get(c.provider, ""),
            notes[c.provider],
        )
        for c in candidates
    ]


def clocks_of(device: str) -> list[EventClock | WallClock]:
    """Best first."""
    return [GraphClock(), EventClock()] if device == "cuda" else [WallClock()]


def measure_ceilings(device: str, dtype: torch.dtype, seconds: float = 1.0) -> Ceilings:
    """Copy of a buffer far larger than the cache, and a square product in ``dtype`` (TF32 off)."""
    megabytes, side = (1024, 8192) if device == "cuda" else (128, 1024)
    source = torch.empty(megabytes * 2**20, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    candidates = [
        Candidate("copy", [lambda: target.copy_(source)]),
        Candidate("matmul", [lambda: torch.mm(x, y, out=out)]),
    ]
    copy, matmul = (m.times for m in interleave(candidates, clocks_of(device)[-1:], seconds, repeats=2))
    if copy is None or matmul is None:
        raise RuntimeError(f"ceilings: expected a copy and a product to run on {device}, and one of them failed")
    return Ceilings(2 * source.numel() / (copy.p50 * 1e-3), 2 * side**3 / (matmul.p50 * 1e-3))


class Floor(NamedTuple):
    """The least time, in milliseconds, that bytes and products allow at the measured ceilings."""

    bytes_ms: float
    flops_ms: float

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)


def floor_of(cost: Cost, ceilings: Ceilings) -> Floor:
    return Floor(cost.bytes / ceilings.copy * 1e3, cost.flops / ceilings.matmul * 1e3)


def input_sets(device: str, bytes_each: int) -> int:
    """How many sets of inputs make a cycle of twice the cache, 2 at least (64 at most: tiny inputs never will); one
    where it alone is 32 times the cache, since two of a million tokens would not fit."""
    if device != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
    return 1 if bytes_each >= 32 * cache else max(2, min(64, math.ceil(2 * cache / max(bytes_each, 1))))
