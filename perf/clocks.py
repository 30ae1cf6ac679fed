"""How long a list of calls takes: replayed as a CUDA graph, or run as it is on the GPU or the CPU.

A clock prepares a candidate once and then gives samples of it, milliseconds a call; ``finish`` is called before the
samples are read, so that a clock need not wait for the device in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


class WallClock:
    """``perf_counter`` around the calls: for the CPU."""

    method = "wall clock"

    def prepare(self, calls: Sequence[Call], repeats: int = 1) -> Callable[[], Callable[[], float]]:
        for call in calls:
            call()

        def sample() -> Callable[[], float]:
            start = time.perf_counter()
            for _ in range(repeats):
                for call in calls:
                    call()
            elapsed = (time.perf_counter() - start) * 1e3 / (repeats * len(calls))
            return lambda: elapsed

        return sample

    def finish(self) -> None:
        pass


class EventClock:
    """CUDA events around the calls, launches included: for what a graph cannot hold."""

    method = "cuda events"

    def prepare(self, calls: Sequence[Call], repeats: int = 1) -> Callable[[], Callable[[], float]]:
        for call in calls:
            call()
        torch.cuda.synchronize()

        def run() -> None:
            for _ in range(repeats):
                for call in calls:
                    call()

        return self._sampler(run, repeats * len(calls))

    def _sampler(self, run: Call, count: int) -> Callable[[], Callable[[], float]]:
        def sample() -> Callable[[], float]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            return lambda: start.elapsed_time(end) / count

        return sample

    def finish(self) -> None:
        torch.cuda.synchronize()


class GraphClock(EventClock):
    """The calls captured as one CUDA graph and replayed between two events: no launch cost from the host."""

    method = "cuda graph"

    def prepare(self, calls: Sequence[Call], repeats: int = 1) -> Callable[[], Callable[[], float]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
        torch.cuda.synchronize()
        return self._sampler(graph.replay, repeats * len(calls))
