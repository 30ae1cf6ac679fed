"""The kernels for Hopper on the CPU, by ``gluon_interpreter``: arithmetic, indices, barriers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from gdn_ops.kernels import hopper
from gdn_ops.kernels.hopper import both_ways, tiles
from gdn_ops.kernels.hopper import invert as invert_module
from gdn_ops.kernels.hopper.maps import maps as hopper_maps
from gdn_ops.kernels.hopper.narrow_scan import narrow_scan
from gdn_ops.kernels.hopper.scan import scan as wide_scan
from gdn_ops.kernels.triton.chunk_backward import chunk_backward
from gdn_ops.kernels.triton.chunk_forward import chunk_forward
from gdn_ops.kernels.triton.chunk_table import CHUNK, chunk_table
from tests.kernels import gluon_interpreter
from tests.kernels.gluon_interpreter import Barrier, interpreted
from tests.kernels.interpreter import call, cutting
from tests.kernels.triton_rule import arguments_of, check_inverse, check_maps, inverse_inputs, scale_of
from tests.oracle import GRADIENTS, assert_all_close, assert_close, cotangents, expected, make_inputs

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [
    (1, 9, 1, 2, 128, 128),
    (1, 64, 2, 2, 128, 128),
    (2, 65, 2, 4, 128, 128),
    (3, 130, 1, 3, 96, 72),
    (1, 400, 1, 1, 128, 200),
    (1, 150, 1, 2, 80, 256),
]


@pytest.mark.parametrize(
    "B, T, H, HV, K, case",
    [
        (1, 9, 1, 2, 128, "random"),
        (2, 64, 2, 2, 128, "random"),
        (2, 150, 1, 2, 80, "random"),
        (1, 130, 1, 2, 80, "strided"),
        (1, 130, 1, 2, 80, "16-bit gates"),
        (1, 130, 1, 2, 80, "strong"),
        (1, 130, 1, 2, 80, "infinite"),
        (1, 130, 1, 2, 128, "one key"),
        (1, 130, 1, 2, 128, "one key 1.9"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_inverse_is_the_portable_one(B, T, H, HV, K, case, dtype, backward):
    x, table = inverse_inputs(B, T, H, HV, K, case, dtype, "cpu"), chunk_table(B, T, None, None)
    with interpreted():
        here = invert_module.invert(x["k"], x["g"], x["beta"], table, backward)
    there = call("intra_chunk:intra_chunk", x["k"], x["k"], x["g"], x["beta"], table, 1.0, backward).result
    check_inverse(here, there, case)


def forward(x: dict, kernel: str, multiprocessors: int = 132) -> dict:
    with interpreted(multiprocessors) as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "has_room", lambda *args: "narrow" in kernel)
        result = dict(zip(("o", "final_state"), chunk_forward(*arguments_of(x), scale_of(x), True)))
        assert [name for name, k in kernels.items() if k.started] == ["hopper_invert_kernel", kernel]
    return result


@pytest.mark.parametrize("B, T, H, HV, K, V", SHAPES)
@pytest.mark.parametrize("dtype, state", [(BF16, True), (FP16, False)])
def test_both_scans_agree_with_the_specification_and_bit_by_bit(B, T, H, HV, K, V, dtype, state):
    x = make_inputs(B, T, H, HV, K, V, dtype, initial_state=state)
    narrow, wide = forward(x, "hopper_narrow_scan_kernel"), forward(x, "hopper_scan_kernel")
    assert_all_close(narrow, expected(x, scale_of(x)), dtype)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_a_program_takes_one_piece_after_the_other(multiprocessors):
    """Of three chunks: the next piece begins with another buffer, and another reader."""
    x = make_inputs(2, 150, 1, 2, 128, 128, BF16, initial_state=True)
    want = forward(x, "hopper_narrow_scan_kernel")
    got = forward(x, "hopper_narrow_scan_kernel", multiprocessors)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("B, T, V, state, parts", [(1, 450, 128, True, 3), (2, 192, 200, False, 2)])
def test_parts_of_sequences_give_the_same_bits(monkeypatch, B, T, V, state, parts):
    x = make_inputs(B, T, 1, 2, 128, V, BF16, initial_state=state)
    whole = forward(x, "hopper_narrow_scan_kernel")
    monkeypatch.setattr(hopper, "SHORTEST_PART", 1)
    with interpreted() as kernels:
        got = dict(zip(whole, chunk_forward(*arguments_of(x), scale_of(x), True)))
    started = {name: kernel.started for name, kernel in kernels.items() if kernel.started}
    assert started == {"hopper_invert_kernel": parts, "hopper_narrow_scan_kernel": parts}
    assert all(torch.equal(got[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "B, T, HV, K, V, dtype, state", [(1, 450, 2, 128, 128, BF16, True), (2, 384, 3, 96, 200, FP16, False)]
)
def test_maps_are_the_portable_ones(B, T, HV, K, V, dtype, state):
    x = make_inputs(B, T, 1, HV, K, V, dtype, initial_state=state)
    x["g"] = x["g"] * 0.01  # or a map of the state is nearly zero
    table = chunk_table(B, T, None, 2)
    with interpreted():
        chunk = invert_module.invert(x["k"], x["g"], x["beta"], table)
        here = hopper_maps(chunk, x["k"], x["v"], table, x["initial_state"])
    there = call("segments:maps", chunk, x["k"], x["v"], table, x["initial_state"]).result
    check_maps(here, there, table, 1e-5)


@pytest.mark.parametrize("scan", [narrow_scan, wide_scan], ids=["narrow", "wide"])
def test_segments_begin_with_their_own_states(scan):
    x, cut = make_inputs(1, 300, 1, 2, 128, 128, BF16), 2 * CHUNK
    x["initial_state"] = torch.randn(3, 2, 128, 128)
    o, final = torch.full_like(x["v"], float("nan")), torch.full((1, 2, 128, 128), float("nan"))
    table = chunk_table(1, 300, None, 2)
    with interpreted():
        chunk = invert_module.invert(x["k"], x["g"], x["beta"], table)
        rest = {"o": o, "initial_state": x["initial_state"], "final_state": final}
        scan(chunk, x["q"], x["k"], x["v"], scale_of(x), table, **rest)
    for i in range(3):
        part = {n: x[n][:, i * cut : (i + 1) * cut] for n in ("q", "k", "v", "g", "beta")}
        want = expected({**part, "initial_state": x["initial_state"][i : i + 1], "cu_seqlens": None}, scale_of(x))
        assert_close(o[:, i * cut : (i + 1) * cut], want["o"], 5e-3, f"o of segment {i}")
    assert_close(final, want["final_state"], 5e-3, "final_state")


@pytest.mark.parametrize(
    "B, T, H, HV, K, V",
    [
        (1, 9, 1, 1, 128, 128),
        (1, 200, 1, 2, 128, 128),
        (2, 65, 2, 4, 96, 128),
        (1, 150, 1, 3, 128, 256),
        (1, 130, 2, 4, 80, 384),
        (1, 70, 1, 1, 128, 512),
    ],
)
@pytest.mark.parametrize("multiprocessors", [132, 2], ids=["room", "no room"])  # one, two warpgroups a program
@pytest.mark.parametrize("dtype, state", [(BF16, True), (FP16, False)])
def test_gradients(B, T, H, HV, K, V, multiprocessors, dtype, state):
    x = make_inputs(B, T, H, HV, K, V, dtype, initial_state=state)
    do, ds = cotangents(x)
    with interpreted(multiprocessors) as kernels:
        got = chunk_backward(do, ds, *arguments_of(x), scale_of(x))
    assert [kernels[f"hopper_{name}_kernel"].started for name in ("invert", "both_ways", "gradient")] == [1, 1, 1]
    want = expected(x, scale_of(x), do=do, ds=ds)
    names = [n for n in GRADIENTS if x[n] is not None]
    assert_all_close({"d" + n: g for n, g in zip(names, got)}, {"d" + n: want["d" + n] for n in names}, dtype)


@pytest.mark.parametrize(
    "B, T, H, HV, K, V", [(2, 70, 2, 4, 128, 128), (1, 130, 2, 4, 80, 256), (2, 64, 3, 3, 128, 256)]
)
@pytest.mark.parametrize("multiprocessors", [132, 2], ids=["room", "no room"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_key_heads_one_after_the_other_give_the_same_bits(B, T, H, HV, K, V, multiprocessors, state):
    x = make_inputs(B, T, H, HV, K, V, BF16, initial_state=state)
    do, ds = cotangents(x)
    got = []
    for largest, starts in ((None, 1), (1, B * H)):
        with interpreted(multiprocessors) as kernels, cutting(largest_group=largest):
            got.append(chunk_backward(do, ds if state else None, *arguments_of(x), scale_of(x)))
        names = ("invert", "both_ways", "gradient")
        assert [kernels[f"hopper_{name}_kernel"].started for name in names] == [starts] * 3
    assert all(map(torch.equal, *got))


@pytest.mark.parametrize(
    "B, T, H, HV, K, V, starts",
    [
        (1, 450, 1, 2, 128, 128, (2, 3, 2)),
        (2, 64 * 7 - 3, 1, 1, 96, 256, (2, 3, 2)),
        (1, 1000, 1, 2, 128, 256, (3, 5, 3)),
    ],
)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_parts_of_the_backward_give_the_same_bits(monkeypatch, B, T, H, HV, K, V, starts, state):
    x = make_inputs(B, T, H, HV, K, V, BF16, initial_state=state)
    do, ds = cotangents(x)
    got = []
    for shortest, fewest in ((1 << 20, 3), (1, 1000)):
        monkeypatch.setattr(hopper, "SHORTEST_STEPS", shortest)
        monkeypatch.setattr(hopper, "FEWEST_PROGRAMS", fewest)
        with interpreted() as kernels:
            got.append(chunk_backward(do, ds if state else None, *arguments_of(x), scale_of(x)))
    assert tuple(kernels[f"hopper_{name}_kernel"].started for name in ("invert", "both_ways", "gradient")) == starts
    assert all(map(torch.equal, *got))


@pytest.mark.parametrize(
    "B, T, H, HV, K, V, parts",
    [
        (1, 450, 1, 2, 128, 128, 2),
        (2, 64 * 7 - 3, 2, 2, 128, 128, 4),
        (1, 300, 1, 3, 96, 128, 1),
        (1, 64 * 6, 1, 1, 128, 384, 3),
        (1, 70, 1, 1, 128, 128, 4),
    ],
)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_sparing_states_gives_the_same_bits(monkeypatch, B, T, H, HV, K, V, parts, state):
    x = make_inputs(B, T, H, HV, K, V, BF16, initial_state=state)
    do, ds = cotangents(x)
    got = []
    for least in (1 << 60, 0):
        monkeypatch.setattr(hopper, "LEAST_TO_SPARE", least)
        monkeypatch.setattr(hopper, "PARTS_TO_SPARE", parts)
        monkeypatch.setattr(hopper, "SHORTEST_STEPS", 0)
        with interpreted() as kernels:
            got.append(chunk_backward(do, ds if state else None, *arguments_of(x), scale_of(x)))
    chunks = -(-T // CHUNK)
    rest = chunks - chunks // 2
    later = -(-rest // -(-rest // parts))
    starts = [kernels[f"hopper_{name}_kernel"].started for name in ("invert", "both_ways", "gradient")]
    assert starts == [2 + chunks % 2, 1 + later, later]
    assert all(map(torch.equal, *got))


def combined(segments, enter, leave, like, T, table, reverse):
    """``combine`` of one sequence in torch, for Triton's interpreter is not this one."""
    M, states = segments.M.float().sum(2), torch.zeros_like(segments.B)
    order = list(range(table.segments))[:: -1 if reverse else 1]
    if enter is not None:
        states[order[0]] = enter[0]
    for i, (here, ahead) in enumerate(pairwise(order)):
        carried = (M[here].mT if reverse else M[here]) @ states[here] if i else 0
        states[ahead] = carried + segments.B[here]
    return states


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_gradients_in_segments(monkeypatch, state):
    x = make_inputs(1, 6 * CHUNK - 9, 1, 2, 128, 128, BF16, initial_state=state)
    do, ds = cotangents(x)
    monkeypatch.setattr("gdn_ops.kernels.hopper.backward.combine", combined)
    with interpreted() as kernels, cutting(shortest_segment=2):
        got = chunk_backward(do, ds, *arguments_of(x), scale_of(x))
    assert kernels["hopper_map_kernel"].started == 1 and kernels["hopper_both_ways_kernel"].started == 2
    want = expected(x, scale_of(x), do=do, ds=ds)
    names = [n for n in GRADIENTS if x[n] is not None]
    assert_all_close({"d" + n: g for n, g in zip(names, got)}, {"d" + n: want["d" + n] for n in names}, BF16)


@pytest.mark.parametrize("enters", [True, False])
def test_reverse_maps(enters):
    """The gradient of the state before every segment but the first; the last one's comes from the final state's."""
    x, cut = make_inputs(1, 5 * CHUNK - 9, 1, 2, 128, 128, BF16, initial_state=True), 2 * CHUNK
    do, ds = cotangents(x)
    table = chunk_table(1, 5 * CHUNK - 9, None, 2)
    leave = torch.full((table.segments, 2, 128, 128), float("nan"))
    with interpreted():
        chunk = invert_module.invert(x["k"], x["g"], x["beta"], table, backward=True)
        inverse = tiles.Squares(chunk.inverse, 0, 5)
        back = partial(both_ways.reverse_maps, chunk, inverse, do, x["q"], x["k"], table, scale_of(x))
        back(enter=ds if enters else None, leave=leave)
    for i in (1, 2):
        part = {n: x[n][:, i * cut : (i + 1) * cut] for n in ("q", "k", "v", "g", "beta")}
        part |= {"initial_state": x["initial_state"], "cu_seqlens": None}
        after = ds if enters and i == 2 else torch.zeros_like(ds)
        want = expected(part, scale_of(x), do=do[:, i * cut : (i + 1) * cut], ds=after)["dinitial_state"]
        assert_close(leave[i : i + 1], want, 5e-3, f"before segment {i}")


def test_a_role_that_waits_in_vain_is_an_error(monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "PATIENCE", 0.1)
    barrier = Barrier()
    barrier.init(2)
    barrier.arrive()
    barrier.wait(1)  # the phase before the first is over
    with pytest.raises(TimeoutError):
        barrier.wait(0)
    barrier.arrive()
    barrier.wait(0)
    with pytest.raises(AssertionError, match="more arrivals"):
        barrier.arrive(3)
