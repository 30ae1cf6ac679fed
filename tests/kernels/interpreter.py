"""Runs the Triton kernels' entry points: on CUDA as they are, on CPU tensors in Triton's interpreter.

Triton decides when it is imported whether it interprets, for its own library as well, so the interpreter lives in a
process of its own: one a test process, started at the first call, with ``TRITON_INTERPRET=1`` set there and nowhere
else. Calls and results travel as pickles over its pipes.

In that process fresh memory is NaN (largest integers), so that a result not wholly written, or memory read before it
is written, cannot pass for zeros; and habits of the interpreter are mended that no GPU has: it multiplies the bit
patterns of bf16 operands as integers in ``tl.dot`` and rounds fp32 to bf16 towards zero (Triton 3.6 and 3.7), and takes
no joined conditions as masks (3.9).
It ignores ``input_precision``: products of fp32 operands are always exact fp32 ones.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from gdn_ops.kernels.batch_invariance import batch_invariant as whole_sequences

PACKAGE = "gdn_ops.kernels.triton"


class Call(NamedTuple):
    """What an entry point returned, and its arguments after the call: in-place results are found there."""

    result: Any
    args: tuple


@contextmanager
def cutting(
    shortest_segment: int | None = None, batch_invariant: bool = False, largest_group: int | None = None
) -> Iterator[None]:
    """Inside, a segment may be as short as ``shortest_segment`` chunks, and two are enough; with ``batch_invariant``,
    none is cut. A group of the backward has at most ``largest_group`` bytes, if it can, and may have one."""
    segments, groups = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("segments", "groups"))
    usual = segments.SHORTEST, segments.FEWEST, groups.SMALLEST, groups.LARGEST
    if shortest_segment is not None:
        segments.SHORTEST, segments.FEWEST = shortest_segment, 2
    if largest_group is not None:
        groups.SMALLEST, groups.LARGEST = 1, largest_group
    try:
        with whole_sequences() if batch_invariant else nullcontext():
            yield
    finally:
        segments.SHORTEST, segments.FEWEST, groups.SMALLEST, groups.LARGEST = usual


def call(entry: str, *args: Any, **cut: Any) -> Call:
    """``call("causal_conv1d:forward", *args)``. Tensors keep their strides; the caller's CPU tensors do not change.

    ``cut`` is what :func:`cutting` takes; it matters to the chunk kernels.
    """
    device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
    if device == "cuda":
        module, function = entry.split(":")
        with cutting(**cut):
            result = getattr(_module(module), function)(*args)
        torch.cuda.synchronize()
        return Call(result, args)
    process = _interpreter()
    try:
        pickle.dump((entry, args, cut), process.stdin)
        process.stdin.flush()
        error, outcome = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError) as e:
        _interpreter.cache_clear()
        raise RuntimeError(f"{entry}: the interpreter ended with status {process.wait()}") from e
    if error is not None:
        raise RuntimeError(f"{entry} failed in the interpreter:\n{error}")
    return Call(*outcome)


def _module(name: str) -> ModuleType:
    """By its name in PACKAGE, or by its whole name."""
    return importlib.import_module(name if name.startswith("gdn_ops.") else f"{PACKAGE}.{name}")


@cache
def _interpreter() -> subprocess.Popen:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.interpreter"],
        env=environment, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def _poison_fresh_memory() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not torch.empty(8).isnan().all():
        raise RuntimeError("expected torch.empty to be filled with NaN")


def _mend_bfloat16() -> None:
    """bf16 blocks are uint16 arrays in the interpreter: the upper halves of fp32 numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, x, dtype):
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(x.data, dtype=np.float32)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, x, dtype)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _mend_masks() -> None:
    """Triton 3.9 makes integers of two conditions joined by ``&``, and then refuses them as a mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def condition(mask):
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self, pointers, mask, *rest):
        return load(self, pointers, condition(mask), *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, condition(mask), *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _serve(requests, answers) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    _mend_bfloat16()
    _mend_masks()
    _poison_fresh_memory()
    while True:
        try:
            entry, args, cut = pickle.load(requests)
        except EOFError:
            return
        try:
            module_name, function = entry.split(":")
            module = _module(module_name)
            kernels = [x for name, x in vars(module).items() if name.endswith("_kernel")]
            if not kernels or not all(isinstance(kernel, InterpretedFunction) for kernel in kernels):
                raise RuntimeError(f"{module_name}: expected interpreted kernels, got {kernels}")
            with cutting(**cut):
                answer = None, (getattr(module, function)(*args), args)
        except Exception:
            answer = traceback.format_exc(), None
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _serve(sys.stdin.buffer, answers)
