"""Pieces of work one after the other in this process, or side by side in processes of their own.

Both take from ``take`` until it gives None, and yield what they took with its outcome: what ``work(item, deadline,
say)`` returned, or ``Failed``. What ran out of time is not yielded.

A process does one piece of work and ends, so that nothing (compiled code, a GPU's memory, a crash) goes from one piece
to the next. Lines of progress and the outcome come through a pipe; only the process that asked writes files of results.
"""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch

GRACE = 20.0

Item = TypeVar("Item")
Take = Callable[[], "Item | None"]
Work = Callable[["Item", float, Callable[[str], None]], Any]
Report = Callable[["Item", str], None]


class OutOfTime(Exception):
    """The deadline passed in the middle of the work."""


class Failed(NamedTuple):
    reason: str


class _Line(NamedTuple):
    text: str


def in_turn(take: Take, work: Work, deadline: float, report: Report) -> Iterator[tuple[Item, Any]]:
    """Here. ``deadline`` is in seconds of ``time.monotonic``."""
    while (item := take()) is not None:
        outcome = _outcome(work, item, deadline, lambda line, item=item: report(item, line))
        if isinstance(outcome, OutOfTime):
            return
        yield item, outcome


def side_by_side(
    take: Take, work: Work, deadline: float, report: Report, jobs: int, grace: float = GRACE,
    begin: Callable[[int], None] | None = None,
) -> Iterator[tuple[Item, Any]]:  # fmt: skip
    """``jobs`` processes at a time, each of which calls ``begin`` first, with its place among them (0 to ``jobs - 1``).
    Work that is not over ``grace`` seconds after the deadline, because a compilation takes long say, is ended; so is
    everything when the iterator is closed or interrupted."""
    context = get_context("spawn")  # CUDA does not survive a fork
    threads = threads_each(jobs)
    going: dict[Connection, tuple[Item, Any, int]] = {}
    try:
        while True:
            while len(going) < jobs and (item := take()) is not None:
                ours, theirs = context.Pipe(duplex=False)
                place = min(set(range(jobs)) - {place for _, _, place in going.values()})
                arguments = (theirs, work, item, deadline, threads, begin and partial(begin, place))
                process = context.Process(target=_worker, args=arguments, daemon=True)
                process.start()
                theirs.close()  # the process has the only other end, so that its death ends the pipe
                going[ours] = item, process, place
            if not going:
                return
            left = deadline + grace - time.monotonic()
            ready = wait(list(going), None if math.isinf(left) else max(0.0, left))
            if not ready:
                return
            for connection in ready:
                item, process, _ = going[connection]
                message = _received(connection, process)
                if isinstance(message, _Line):
                    report(item, message.text)
                    continue
                del going[connection]
                connection.close()
                process.join()
                if not isinstance(message, OutOfTime):
                    yield item, message
    finally:
        for _, process, _ in going.values():
            process.terminate()
        for _, process, _ in going.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def threads_each(jobs: int) -> int:
    """Of torch's threads, for each of ``jobs`` processes."""
    return max(1, torch.get_num_threads() // jobs)


def _received(connection: Connection, process: Any) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Failed(f"its process ended {how} and gave no result")


def _outcome(work: Work, item: Item, deadline: float, say: Callable[[str], None]) -> Any:
    try:
        return work(item, deadline, say)
    except OutOfTime as error:
        return error
    except Exception:
        return Failed(traceback.format_exc().rstrip())


def use_gpu(place: int) -> None:
    """Deals processes out over the GPUs that there are."""
    torch.cuda.set_device(place % torch.cuda.device_count())


def _worker(
    connection: Connection, work: Work, item: Item, deadline: float, threads: int, begin: Callable[[], None] | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that asked ends this one
    torch.set_num_threads(threads)
    if begin is not None:
        begin()
    # Where the other end is gone, the first line that is sent ends the work.
    connection.send(_outcome(work, item, deadline, lambda line: connection.send(_Line(line))))
