"""Quantiles, turns, and what becomes of a candidate that fails."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perf.clocks import WallClock
from perf.measure import Candidate, Ceilings, floor_of, input_sets, interleave, measure_ceilings, quantiles
from perf.shapes import Cost, Shape, cost


class Ticks:
    """A clock whose samples are 1, 2, 3, ... of a candidate's own, and which writes down whose turn it was."""

    method = "ticks"

    def __init__(self, turns):
        self.turns = turns

    def prepare(self, calls, repeats=1):
        name, count = calls[0](), iter(range(1, 1000))

        def sample():
            self.turns.append(name)
            value = float(next(count))
            return lambda: value

        return sample

    def finish(self):
        self.turns.append("finish")


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_quantiles_are_numpys(n):
    samples = torch.rand(n, generator=torch.Generator().manual_seed(n)).tolist()
    got = quantiles(samples)
    assert got[:3] == pytest.approx(np.quantile(samples, [0.2, 0.5, 0.8]).tolist())
    assert got.least == min(samples) and got.samples == n


def test_no_samples_no_quantiles():
    with pytest.raises(ValueError, match="samples: expected at least one"):
        quantiles([])


def test_candidates_take_turns():
    turns = []
    found = interleave([Candidate(n, [lambda n=n: n]) for n in "abc"], [Ticks(turns)], 60, most=3, warm=2)
    assert turns == ["a", "b", "c", "finish"] * 5
    for measurement in found:  # the first two, warm-up, do not count
        assert measurement.times == quantiles([3.0, 4.0, 5.0]) and measurement.method == "ticks"


def test_time_is_kept():
    """Time is up after the first round that counts; one round is measured even when there was none left."""
    slow = [Candidate("slow", [lambda: time.sleep(0.05)])]
    start = time.perf_counter()
    (one,) = interleave(slow, [WallClock()], 0.0, warm=0)
    (some,) = interleave(slow, [WallClock()], 0.2, warm=0)
    assert one.times.samples == 1 and 2 <= some.times.samples <= 5
    assert time.perf_counter() - start < 2
    assert one.times.p50 >= 50


def test_one_that_fails_does_not_lose_the_others():
    count = iter(range(1000))

    def late():
        if next(count) == 4:
            raise RuntimeError("gave up\nsecond line")

    def never():
        raise ValueError("no such kernel")

    found = interleave(
        [Candidate("late", [late]), Candidate("never", [never]), Candidate("good", [lambda: None])],
        [WallClock()], 60, most=10,
    )  # fmt: skip
    late, never, good = found
    assert late.times is None and late.note == "RuntimeError: gave up"
    assert never.times is None and never.note == "no wall clock: ValueError: no such kernel"
    assert good.times.samples == 10 and good.note == ""


def test_a_second_clock_steps_in():
    class Broken(WallClock):
        method = "broken"

        def prepare(self, calls, repeats=1):
            raise RuntimeError("cannot capture")

    (found,) = interleave([Candidate("a", [lambda: None])], [Broken(), WallClock()], 0.0)
    assert found.method == "wall clock" and found.note == "no broken: RuntimeError: cannot capture"


def test_floor_is_the_larger():
    floor = floor_of(Cost(bytes=2_000, flops=30_000), Ceilings(copy=1e6, matmul=1e7))
    assert (floor.bytes_ms, floor.flops_ms) == pytest.approx((2.0, 3.0)) and floor.ms == floor.flops_ms


def test_sets_of_inputs_leave_the_cache_and_fit_the_memory(monkeypatch):
    """Twice a cache of 50 MiB; two at least, but of a giant one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(L2_cache_size=50 * 2**20))
    million = cost(Shape(16, 32, 1, 2**20), "forward", torch.bfloat16).bytes
    for bytes_each, sets in ((10**3, 64), (10 * 2**20, 10), (200 * 2**20, 2), (1400 * 2**20, 2), (million, 1)):
        assert input_sets("cuda", bytes_each) == sets
    assert input_sets("cpu", million) == 2


def test_ceilings_of_this_machine():
    ceilings = measure_ceilings("cpu", torch.float32, seconds=0.1)
    assert 1e8 < ceilings.copy < 1e13 and 1e8 < ceilings.matmul < 1e14
