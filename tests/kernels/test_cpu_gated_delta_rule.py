"""The CPU kernels as such: no token loop where there must be none, bounded memory, right numbers at long lengths."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_ops.kernels.cpu import chunks
from gdn_ops.kernels.cpu import gated_delta_rule as cpu
from tests.oracle import assert_close, cotangents, make_inputs


class CountCalls(TorchDispatchMode):
    """Calls that compute; views cost next to nothing and are left out."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def arguments(T, dtype=torch.float32, B=1, H=1, HV=2, K=16, V=16):
    x = make_inputs(B, T, H, HV, K, V, dtype, initial_state=True)
    return [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")], cotangents(x)


def calls(function, *args):
    with CountCalls() as counter:
        function(*args)
    return counter.calls


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_work_grows_by_chunks_not_by_tokens(direction):
    """Going from 512 to 1024 tokens adds 8 chunks; a token loop would add 64 calls a chunk at the least."""

    def count(T):
        x, (do, ds) = arguments(T)
        if direction == "forward":
            return calls(cpu.chunk_forward, *x, None, 0.25, True)
        return calls(cpu.chunk_backward, do, ds, *x, None, 0.25)

    assert count(1024) - count(512) <= {"forward": 10, "backward": 24}[direction] * 8


def test_one_token_takes_the_short_way():
    """Decode is a handful of calls, no chunk machinery."""
    x, _ = arguments(1)
    assert calls(cpu.chunk_forward, *x, None, 0.25, True) <= 60


@pytest.mark.slow
def test_long_sequence_in_fp32_keeps_its_accuracy():
    x, (do, ds) = arguments(4096, K=32, V=32)
    wide = [t.double() for t in x]
    for got, want in zip(cpu.chunk_forward(*x, None, 0.25, True), cpu.recurrent_forward(*wide, None, 0.25, True)):
        assert_close(got, want, 1e-5, "forward")
    want = cpu.chunk_backward(do.double(), ds.double(), *wide, None, 0.25)
    for n, g, w in zip(["q", "k", "v", "g", "beta", "initial_state"], cpu.chunk_backward(do, ds, *x, None, 0.25), want):
        assert_close(g, w, 5e-5, "d" + n)


@pytest.mark.parametrize("sizes", [{"STATES": 1}, {"SEGMENT": 1}, {"STATES": 1, "SEGMENT": 1}], ids=str)
def test_blocks_of_heads_and_segments_change_nothing(monkeypatch, sizes):
    """A head at a time, a chunk at a time: the sizes that small inputs never reach by themselves."""
    x, (do, ds) = arguments(200, torch.float64, B=2, H=3, HV=6)
    wanted = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    assert len(chunks.head_blocks(x[0], x[2])) == 1 and len(chunks.spans(x[2])) == 2
    for name, size in sizes.items():
        monkeypatch.setattr(chunks, name, size)
    assert len(chunks.head_blocks(x[0], x[2])) == (3 if "STATES" in sizes else 1)
    assert len(chunks.spans(x[2])) == (4 if "SEGMENT" in sizes else 2)
    got = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    for n, g, w in zip(("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate"), got, wanted):
        assert_close(g, w, 1e-12, n)


def test_results_share_no_memory():
    x, (do, ds) = arguments(128, H=1, HV=1)
    results = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    storages = {t.untyped_storage().data_ptr() for t in (*results, *x, do, ds)}
    assert len(storages) == len(results) + len(x) + 2


def test_pool_slots():
    state = torch.zeros(4, 1, 1, 1)
    assert cpu.pool_slots(state, None, 3).tolist() == [0, 1, 2]
    assert cpu.pool_slots(state, torch.tensor([3, -1], dtype=torch.int32), 2).tolist() == [3, -1]
    for bad in (4, -2):
        with pytest.raises(IndexError, match=r"\[-1, 4\)"):
            cpu.pool_slots(state, torch.tensor([0, bad]), 2)
