"""Sequences cut into segments and the table that numbers them: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import call, cutting
from tests.kernels.triton_rule import DTYPES, backward, check_chunk, chunk, forward, scale_of
from tests.oracle import DEVICES, assert_all_close, cotangents, expected, make_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)


def segment_of(x: dict, **cut) -> int | None:
    """Chunks a segment of such a call on an H200 (which the interpreter stands for)."""
    from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
    from gdn_ops.kernels.triton.segments import segment_length

    with as_if_on(CHIPS["sm_90"]), cutting(**cut):
        return segment_length(x["q"], x["v"], x["cu_seqlens"])


def remembering(x: dict) -> dict:
    """With gates so weak that a segment passes on what it was given; the usual ones leave nothing of it, and its ``M``
    could be anything small."""
    return {**x, "g": x["g"] / 50}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_two_chunks_and_a_short_last_one(device, dtype):
    x = remembering(make_inputs(1, 4 * 64 + 7, 1, 2, 24, 40, dtype, device, initial_state=True))
    assert segment_of(x, shortest_segment=2) == 3
    check_chunk(x, shortest_segment=2)


def test_rows_of_one_chunk_segments_without_initial_state(device):
    x = make_inputs(2, 150, 1, 1, 16, 16, torch.bfloat16, device)
    assert segment_of(x, shortest_segment=1) == 1
    check_chunk(x, shortest_segment=1)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_rows_and_heads_begin_and_end_with_their_own_states(device, parts):
    """Two segments have no map, three one, which serves both ways, five three."""
    x = remembering(make_inputs(2, 64 * parts - 5, 1, 2, 16, 24, device=device, initial_state=True))
    assert segment_of(x, shortest_segment=1) == 1
    check_chunk(x, shortest_segment=1)


def test_states_of_16_bits(device):
    x = remembering(make_inputs(1, 150, 1, 1, 16, 16, device=device, initial_state=True))
    do, ds = cotangents(x)
    low, ds = x["initial_state"].bfloat16(), ds.bfloat16()
    x["initial_state"] = low.float()
    want, cut = expected(x, scale_of(x), do=do, ds=ds), {"shortest_segment": 1}
    got = {**forward({**x, "initial_state": low}, **cut), **backward(x, do, ds, **cut)}
    assert_all_close(got, want, torch.float32)


@pytest.mark.parametrize("bounds", [[0, 0, 201, 201], [0, 70, 70, 71, 265]], ids=lambda b: "-".join(map(str, b)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences_in_segments(device, dtype, bounds):
    """Empty sequences, which have no segment, before, between and behind; some of one, two and four."""
    T = max(bounds[-1], 202)
    x = remembering(make_inputs(1, T, 1, 2, 16, 24, dtype, device, initial_state=True, cu_seqlens=bounds))
    assert segment_of(x, shortest_segment=1) == 1
    if x["q"].shape[1] == bounds[-1]:
        check_chunk(x, shortest_segment=1)
        return
    do, ds = cotangents(x)
    got = chunk(x, do, ds, shortest_segment=1)
    names, end = ("q", "k", "v", "g", "beta"), bounds[-1]
    want = expected({**x, **{n: x[n][:, :end] for n in names}}, scale_of(x), do=do[:, :end], ds=ds)
    for n, t in got.items():
        assert "state" in n or not t[:, end:].any(), n
    assert_all_close({n: t if "state" in n else t[:, :end] for n, t in got.items()}, want, dtype)


def test_tokens_of_no_sequence_are_zeros(device):
    x = make_inputs(1, 150, 1, 1, 16, 16, device=device, initial_state=True, cu_seqlens=[0, 0])
    assert segment_of(x, shortest_segment=1) == 1
    do, ds = cotangents(x)
    got = chunk(x, do, ds, shortest_segment=1)
    assert torch.equal(got.pop("final_state"), x["initial_state"]) and torch.equal(got.pop("dinitial_state"), ds)
    assert not any(t.any() for t in got.values())


def test_strong_gates_end_a_map(device):
    """A map through ``exp(g) = 0`` is zero: nothing of the segments before it is left, and nothing is NaN."""
    x = make_inputs(1, 200, 1, 1, 16, 16, device=device, initial_state=True)
    x["g"][:, [3, 64, 130]] = -1e4
    check_chunk(x, shortest_segment=1)


def test_without_final_state(device):
    x = remembering(make_inputs(1, 150, 1, 1, 16, 16, device=device, initial_state=True))
    do, ds = cotangents(x)
    want = expected(x, scale_of(x), do=do, ds=ds * 0)
    cut = {"shortest_segment": 1}
    got = {**forward(x, output_final_state=False, **cut), **backward(x, do, None, **cut)}
    assert_all_close(got, {n: want[n] for n in got}, torch.float32)


def test_batch_invariant_keeps_sequences_whole(device):
    """The bits of a sequence alone are those in company; cut into segments they are others, inside the table."""
    bounds = [0, 150, 200]
    x = make_inputs(1, 200, 1, 1, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    whole = {"shortest_segment": 1, "batch_invariant": True}
    assert segment_of(x, **whole) is None
    company = chunk(x, do, ds, **whole)
    alone = {n: x[n][:, :150] for n in ("q", "k", "v", "g", "beta")}
    alone |= {"initial_state": x["initial_state"][:1], "cu_seqlens": None}
    single = chunk(alone, do[:, :150], ds[:1], **whole)
    for n, t in single.items():
        assert torch.equal(t, company[n][:1] if "state" in n else company[n][:, :150]), n
    cut = chunk(alone, do[:, :150], ds[:1], shortest_segment=1)
    assert not torch.equal(cut["final_state"], single["final_state"])


def test_same_bits_twice(device):
    x = make_inputs(1, 140, 1, 1, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=[0, 140])
    do, ds = cotangents(x)
    first, second = (chunk(x, do, ds, shortest_segment=1) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def numbered(bounds: list[int], T: int, segment: int | None) -> tuple[list[int], list[int], list[int] | None]:
    """What a table has to hold, sequence by sequence: bounds, chunks before, segments before."""
    clamped = []
    for bound in bounds:
        clamped.append(max(min(max(bound, 0), T), clamped[-1] if clamped else 0))
    chunks, segments = [0], [0]
    for begin, end in zip(clamped, clamped[1:]):  # noqa: RUF007
        chunks.append(chunks[-1] - (begin - end) // 64)
        segments.append(segments[-1] - ((begin - end) // 64) // (segment or 1))
    return clamped, chunks, segments if segment else None


def many_bounds() -> list[int]:
    """700 sequences, more than two blocks of the kernel, many of them empty."""
    lengths = torch.randint(-40, 150, (700,), generator=torch.Generator().manual_seed(0)).clamp(min=0)
    return [0, *lengths.cumsum(0).tolist()]


TABLES = {
    "short": ([0, 0, 1, 65, 65, 193], 193),
    "tail": ([0, 64, 128], 200),
    "many": (many_bounds(), many_bounds()[-1]),
    "wrong": ([0, 90, 30, 500, -7, 64], 100),
}


@pytest.mark.parametrize("bounds, T", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("segment", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_table(device, bounds, T, segment, dtype):
    """Wrong bounds, which no host may look at, still stay inside the tokens and never go back."""
    table = call("chunk_table:chunk_table", 1, T, torch.tensor(bounds, dtype=dtype, device=device), segment).result
    clamped, chunks, segments = numbered(bounds, T, segment)
    assert table.cu_seqlens.tolist() == clamped and table.chunk_offsets.tolist() == chunks
    assert table.chunks >= chunks[-1] and table.sequences == len(bounds) - 1
    if segment is None:
        assert table.segment_offsets is None and table.segments == table.sequences
    else:
        assert table.segment_offsets.tolist() == segments and table.segments >= segments[-1]


def test_batch_invariant_token_alone_and_packed(device):
    """One token, which is otherwise the recurrent kernel's, has the bits that it has between others."""
    x = make_inputs(1, 5, 1, 2, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=[0, 2, 3, 5])
    do, ds = cotangents(x)
    company = chunk(x, do, ds, batch_invariant=True)
    alone = {n: x[n][:, 2:3] for n in ("q", "k", "v", "g", "beta")}
    alone |= {"initial_state": x["initial_state"][1:2], "cu_seqlens": None}
    for n, t in chunk(alone, do[:, 2:3], ds[1:2], batch_invariant=True).items():
        assert torch.equal(t, company[n][1:2] if "state" in n else company[n][:, 2:3]), n


def test_gates_that_are_not_numbers_show(device):
    x = make_inputs(1, 70, 1, 1, 16, 16, torch.bfloat16, device)
    x["g"][:, 66] = float("nan")
    o = forward(x)["o"]
    assert o[:, :64].isfinite().all() and o[:, 66:].isnan().all()
