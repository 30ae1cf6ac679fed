"""Groups of the backward, done one after the other: which there are, and that they give what the whole call gives."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gdn_ops.kernels.batch_invariance import batch_invariant
from gdn_ops.kernels.triton import groups as module
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
from gdn_ops.kernels.triton.chunk_backward import chunk_backward
from gdn_ops.kernels.triton.chunk_forward import scan_configuration
from gdn_ops.kernels.triton.chunk_table import chunk_table
from gdn_ops.kernels.triton.compile_case import cases_of_call
from gdn_ops.kernels.triton.groups import groups
from gdn_ops.kernels.triton.launch import traced
from gdn_ops.kernels.triton.segments import segment_length
from tests.kernels.interpreter import cutting
from tests.kernels.triton_rule import backward
from tests.oracle import DEVICES, cotangents, make_inputs

BF16, FP32 = torch.bfloat16, torch.float32
SMALLEST = module.SMALLEST


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """The rule shows at sizes that a machine computes in no time."""
    monkeypatch.setattr(module, "SMALLEST", 64 << 20)


def call_of(B: int, T: int, H: int, HV: int, D: int = 128, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """q and v without storage."""
    return tuple(torch.empty(B, T, heads, D, dtype=dtype, device="meta") for heads in (H, HV))


def bytes_of(q: torch.Tensor, v: torch.Tensor) -> int:
    """Of S, dS and V'."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    return B * -(-T // 64) * HV * (2 * K * V + 64 * V) * q.element_size()


def lengths(parts: list[tuple[slice, slice]]) -> list[tuple[int, int]]:
    return [(rows.stop - rows.start, heads.stop - heads.start) for rows, heads in parts]


@pytest.mark.parametrize(
    "B, T, H, HV, D, by_heads, want",
    [
        (1, 8192, 16, 32, 128, True, [(1, 16)]),  # one wave of 128 programs
        (2, 8192, 16, 32, 128, True, [(2, 16)]),  # of twice the columns
        (3, 8192, 16, 32, 128, True, [(2, 16), (1, 16)]),
        (4, 8192, 16, 32, 128, True, [(2, 16)] * 2),
        (4, 8192, 16, 32, 128, False, [(2, 16)] * 2),
        (5, 8192, 16, 32, 128, True, [(2, 16), (2, 16), (1, 16)]),
        (8, 4096, 16, 32, 128, True, [(2, 16)] * 4),
        (7, 4096, 16, 16, 128, True, [(4, 16), (3, 16)]),
        (3, 8192, 24, 48, 128, True, [(1, 24)] * 3),  # 288 programs, three waves
        (3, 8192, 20, 40, 128, True, [(3, 20)]),  # 240, two; parts of 160 and 80 are three
        (1, 8192, 16, 64, 128, True, [(1, 16)]),
        (1, 8192, 64, 128, 128, True, [(1, 32)] * 2),
        (1, 8192, 64, 128, 128, False, [(1, 64)]),
        (2, 8192, 64, 128, 128, True, [(1, 32)] * 4),
        (1, 8192, 8, 16, 128, True, [(1, 8)]),  # cut into segments
        (8, 2048, 8, 8, 256, False, [(1, 8)] * 8),
        (4, 512, 16, 32, 128, True, [(4, 16)]),  # 80 MiB
        (4, 1024, 16, 32, 128, True, [(2, 16)] * 2),
        (4096, 64, 2, 2, 128, True, [(820, 2)] + [(819, 2)] * 4),
    ],
)
def test_the_groups_of_a_call_on_an_h100(B, T, H, HV, D, by_heads, want):
    with as_if_on(CHIPS["sm_90"]):
        assert lengths(groups(*call_of(B, T, H, HV, D), None, by_heads)) == want


@pytest.mark.parametrize("B, T, want", [(1, 8192, [1]), (6, 8192, [6]), (8, 8192, [4] * 2), (16, 4096, [8] * 2)])
def test_groups_are_large(monkeypatch, B, T, want):
    monkeypatch.setattr(module, "SMALLEST", SMALLEST)
    with as_if_on(CHIPS["sm_90"]):
        assert lengths(groups(*call_of(B, T, 16, 32), None, True)) == [(rows, 16) for rows in want]


def test_packed_and_recorded_calls_stay_whole():
    q, v = call_of(8, 4096, 16, 32)
    bounds = torch.empty(9, dtype=torch.int32, device="meta")
    with as_if_on(CHIPS["sm_90"]):
        assert lengths(groups(q[:1], v[:1], bounds, True)) == [(1, 16)]
        with traced():
            assert lengths(groups(q, v, None, True)) == [(8, 16)]


def scans(q: torch.Tensor, v: torch.Tensor) -> tuple[int | None, int]:
    """Chunks a segment, and waves of programs, of both scans."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    segment = segment_length(q, v, None, ways=2)
    pairs = 2 * HV * chunk_table(B, T, None, segment).segments
    columns = scan_configuration(q, K, V, pairs)["BV"]
    with as_if_on(CHIPS["sm_90"]):
        return segment, -(-pairs * -(-V // columns) // 132)


@pytest.mark.parametrize("dtype, D", [(BF16, 64), (BF16, 128), (BF16, 256), (FP32, 128)], ids=str)
@pytest.mark.parametrize("by_heads", [True, False], ids=["heads", "rows"])
@pytest.mark.parametrize("invariant", [True, False], ids=["invariant", "segments"])
def test_groups_cover_a_call_and_cost_no_waves_and_no_segments(dtype, D, by_heads, invariant):
    parted = 0
    for B, T, (H, HV) in product(
        (1, 2, 3, 5, 7, 8, 16), (64, 1000, 4096, 32768), ((1, 12), (6, 6), (16, 32), (32, 96))
    ):
        q, v = call_of(B, T, H, HV, D, dtype)
        with as_if_on(CHIPS["sm_90"]), batch_invariant() if invariant else nullcontext():
            parts = groups(q, v, None, by_heads)
            of_values = [slice(heads.start * HV // H, heads.stop * HV // H) for _, heads in parts]
            made = [scans(q[rows, :, heads], v[rows, :, some]) for (rows, heads), some in zip(parts, of_values)]
            segment, waves = scans(q, v)
        covered = torch.zeros(B, H, dtype=torch.int64)
        for rows, heads in parts:
            covered[rows, heads] += 1
        assert covered.eq(1).all()
        assert sum(n for _, n in made) <= waves and {cut for cut, _ in made} == {segment}
        some_rows, some_heads = ({some.stop - some.start for some in axis} for axis in zip(*parts))
        assert max(some_rows) - min(some_rows) <= 1 and len(some_heads) == 1
        assert (len({rows.start for rows, _ in parts}) - 1) * max(some_rows) < B  # fewer would be longer
        assert some_heads == {H} or (by_heads and some_rows == {1})
        assert len(parts) == 1 or len(parts) * module.SMALLEST <= bytes_of(q, v)
        parted += len(parts) > 1
    assert parted > 20


@pytest.mark.parametrize(
    "B, T, H, HV, mib, want",
    [
        (1, 8192, 16, 32, 320, [(1, 16)]),
        (1, 8192, 16, 32, 319, [(1, 8)] * 2),
        (1, 8192, 16, 32, 79, [(1, 4)] * 4),
        (1, 8192, 6, 18, 70, [(1, 3)] * 2),  # 180 MiB: three would have less than 64 each
        (2, 8192, 16, 32, 320, [(1, 16)] * 2),
        (2, 8192, 16, 32, 200, [(1, 8)] * 4),
        (8, 4096, 16, 32, 320, [(2, 16)] * 4),
        (8, 4096, 16, 32, 319, [(1, 16)] * 8),
        (1, 8192, 7, 14, 1, [(1, 7)]),
    ],
)
def test_larger_groups_than_may_be_are_parted_further(monkeypatch, B, T, H, HV, mib, want):
    monkeypatch.setattr(module, "LARGEST", mib << 20)
    with as_if_on(CHIPS["sm_90"]):
        q, v = call_of(B, T, H, HV)
        assert lengths(groups(q, v, None, True)) == want


class Peak(TorchDispatchMode):
    """Counts bytes of the tensors made inside, and the most that there are at once."""

    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            self._add(made.untyped_storage().nbytes())
            weakref.finalize(made.untyped_storage(), self._add, -made.untyped_storage().nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def test_groups_take_turns_in_the_same_memory(monkeypatch):
    """Four groups have a quarter of the whole call's memory, beside all gradients."""
    q, v = call_of(8, 4096, 16, 32)
    g = torch.empty(8, 4096, 32, device="meta")
    peaks = []
    for smallest in (bytes_of(q, v) + 1, bytes_of(q, v) // 4):
        monkeypatch.setattr(module, "SMALLEST", smallest)
        with as_if_on(CHIPS["sm_90"]), Peak() as peak:
            cases_of_call("", chunk_backward, v, None, q, q, v, g, g, None, None, 0.1)
        peaks.append(peak.most)
    assert peaks[1] <= peaks[0] // 4 + sum(x.numel() * x.element_size() for x in (q, q, v, g, g))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, state", [(FP32, False), (BF16, True)], ids=["fp32", "bf16 with states"])
@pytest.mark.parametrize("T, segment", [(70, None), (130, 1)], ids=["whole", "segments"])
def test_rows_one_after_the_other_give_the_same_bits(device, dtype, state, T, segment):
    """Cut, a chunk is a segment, in company and alone."""
    x = make_inputs(3, T, 2, 4, 48, 32, dtype, device, initial_state=state)
    do, ds = cotangents(x)
    ds, cut = ds if state else None, {"shortest_segment": segment}
    whole, size = backward(x, do, ds, **cut), bytes_of(x["q"], x["v"])
    for largest, want in ((size - 1, [(2, 2), (1, 2)]), (1, [(1, 2)] * 3)):
        with as_if_on(CHIPS["sm_90"]), cutting(**cut, largest_group=largest):
            assert lengths(groups(x["q"], x["v"], None, False)) == want
            for rows in (slice(3), *(rows for rows, _ in groups(x["q"], x["v"], None, False))):
                assert segment_length(x["q"][rows], x["v"][rows], None, ways=2) == segment
        parts = backward(x, do, ds, **cut, largest_group=largest)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
