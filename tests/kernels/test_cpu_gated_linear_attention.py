"""The CPU kernels of gated linear attention: no token loop, bounded memory, right numbers at long lengths."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.kernels.cpu import chunks
from gdn_ops.kernels.cpu import gated_linear_attention as cpu
from tests.kernels.test_cpu_gated_delta_rule import calls
from tests.oracle import assert_close, cotangents, make_inputs


def arguments(T, dtype=torch.float32, B=1, H=1, HV=2, K=16, V=16):
    x = make_inputs(B, T, H, HV, K, V, dtype, initial_state=True)
    return [x[n] for n in ("q", "k", "v", "g", "initial_state")], cotangents(x)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_work_grows_by_chunks_not_by_tokens(direction):
    """What a chunk adds is one step of its state, each way: a call or two, against 64 at the least of a token loop."""

    def count(T):
        x, (do, ds) = arguments(T)
        if direction == "forward":
            return calls(cpu.chunk_forward, *x, None, 0.25, True)
        return calls(cpu.chunk_backward, do, ds, *x, None, 0.25)

    assert count(1024) - count(512) <= {"forward": 1, "backward": 2}[direction] * 8


def test_one_token_takes_the_short_way():
    x, _ = arguments(1)
    assert calls(cpu.chunk_forward, *x, None, 0.25, True) <= 40


@pytest.mark.slow
def test_long_sequence_in_fp32_keeps_its_accuracy():
    x, (do, ds) = arguments(4096, K=32, V=32)
    wide = [t.double() for t in x]
    for got, want in zip(cpu.chunk_forward(*x, None, 0.25, True), cpu.recurrent_forward(*wide, None, 0.25, True)):
        assert_close(got, want, 1e-5, "forward")
    want = cpu.chunk_backward(do.double(), ds.double(), *wide, None, 0.25)
    for n, g, w in zip(["q", "k", "v", "g", "initial_state"], cpu.chunk_backward(do, ds, *x, None, 0.25), want):
        assert_close(g, w, 5e-5, "d" + n)


@pytest.mark.parametrize("sizes", [{"STATES": 1}, {"SEGMENT": 1}, {"STATES": 1, "SEGMENT": 1}], ids=str)
def test_blocks_of_heads_and_segments_change_nothing(monkeypatch, sizes):
    x, (do, ds) = arguments(200, torch.float64, B=2, H=3, HV=6)
    wanted = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    for name, size in sizes.items():
        monkeypatch.setattr(chunks, name, size)
    assert len(chunks.head_blocks(x[0], x[2])) == (3 if "STATES" in sizes else 1)
    assert len(chunks.spans(x[2])) == (4 if "SEGMENT" in sizes else 2)
    got = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    for n, g, w in zip(("o", "state", "dq", "dk", "dv", "dg", "dstate"), got, wanted):
        assert_close(g, w, 1e-12, n)


def test_results_share_no_memory():
    x, (do, ds) = arguments(128, H=1, HV=1)
    results = [*cpu.chunk_forward(*x, None, 0.25, True), *cpu.chunk_backward(do, ds, *x, None, 0.25)]
    storages = {t.untyped_storage().data_ptr() for t in (*results, *x, do, ds)}
    assert len(storages) == len(results) + len(x) + 2
