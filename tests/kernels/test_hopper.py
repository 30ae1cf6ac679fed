"""The kernels for Hopper alone: compiled here, run with ``-m gpu``, and held against their portable twins."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

import gdn_ops
from gdn_ops.kernels import hopper
from gdn_ops.kernels.batch_invariance import batch_invariant
from gdn_ops.kernels.hopper import both_ways as both_ways_module
from gdn_ops.kernels.hopper import gradients as gradients_module
from gdn_ops.kernels.hopper import invert as invert_module
from gdn_ops.kernels.hopper import maps as maps_module
from gdn_ops.kernels.hopper import narrow_scan as narrow_module
from gdn_ops.kernels.hopper import scan as scan_module
from gdn_ops.kernels.hopper import tiles
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on
from gdn_ops.kernels.triton.chunk_backward import chunk_backward
from gdn_ops.kernels.triton.chunk_forward import chunk_forward
from gdn_ops.kernels.triton.chunk_table import CHUNK, chunk_table
from gdn_ops.kernels.triton.intra_chunk import STRETCH, intra_chunk
from gdn_ops.kernels.triton.launch import traced
from gdn_ops.kernels.triton.segments import maps as portable_maps
from gdn_ops.kernels.triton.segments import segment_length
from tests.kernels.interpreter import cutting
from tests.kernels.roles import roles_kernel
from tests.kernels.triton_rule import (
    arguments_of,
    check_chunk,
    check_inverse,
    check_maps,
    chunk,
    forward,
    inverse_inputs,
    scale_of,
)
from tests.memory import with_memory
from tests.oracle import assert_all_close, assert_close, cotangents, expected, make_inputs, on_hopper

pytestmark = pytest.mark.skipif(not hopper.has_gluon(), reason="of Triton, 3.6 and 3.7 have what these kernels take")
gpu = pytest.mark.gpu


SQUARES = ("t_since", "t_each", "i_since", "i_each")
SLOTS = (*SQUARES, "slots", "shift", "later_slots", "later_since")


def descriptor(block: list[int], element: str) -> str:
    layout = gl.NVMMASharedLayout(128 if block[-2] > 1 else 0, 16 if element != "fp32" else 32, rank=len(block))
    return f"tensordesc<{element}{block},{layout!r}>"


def built(tmp_path, kernel, types: dict[str, str], constants: dict, registers: int):
    """Of a kernel for sm_90: shared memory, bytes a thread that are spilled, and what ptxas says."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, constexprs=constants)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": registers})
    (tmp_path / "kernel.ptx").write_text(result.asm["ptx"])
    files = [str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", *files]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return result.metadata.shared, sum(map(int, re.findall(r"(\d+) bytes spill", said))), said


def tiles_of(element: str) -> dict[str, str]:
    """Descriptors by the names that the kernels have for them."""
    tokens, row = [1, 1, CHUNK], [1, CHUNK]
    return {
        **dict.fromkeys(("q", "k", "dq", "dk"), descriptor([*tokens, tiles.BK], element)),
        **dict.fromkeys(("v", "do", "o", "dv", "X"), descriptor([*tokens, tiles.BV], element)),
        **dict.fromkeys(("transition", "inverse", "P"), descriptor([CHUNK, CHUNK], element)),
        "sums": descriptor([1, 2 * CHUNK], "fp32"),
        **dict.fromkeys(("from_start", "to_end", "erasing", "beta"), descriptor(row, "fp32")),
        **dict.fromkeys(("states", "dstates"), descriptor([1, tiles.BV, tiles.BK], element)),
        **dict.fromkeys(("scale", "score_scale"), "fp32"),
        **dict.fromkeys(("T", "SEGMENT", "since", "until", "items", "programs", *tiles.Chunks._fields, *SLOTS), "i32"),
    }


def check_built(built, spilled: int = 64) -> None:
    """Also: ptxas keeps products in flight, which it says where it does not, and nothing to speak of is spilled."""
    shared, bytes_spilled, said = built
    assert shared <= CHIPS["sm_90"].shared_memory
    assert "serialized" not in said and "injected" not in said, said
    assert bytes_spilled <= spilled, said


KINDS = [
    ("bf16", 128, 128, True),
    ("fp16", 128, 128, False),
    ("bf16", 96, 200, True),
    ("bf16", 128, 256, True),
    ("fp16", 96, 384, False),
]


def roles_of(module) -> dict[str, int]:
    """Registers by the names that its kernel has for them."""
    of = "REGISTERS_"
    return {name.removeprefix(of): n for name, n in vars(module).items() if name.startswith(of)}


def with_states(types: dict, constants: dict, names: tuple[str, ...], given: bool) -> tuple[dict, dict]:
    return (
        ({**types, **dict.fromkeys(names, "*fp32")}, constants) if given else (types, constants | dict.fromkeys(names))
    )


@pytest.mark.parametrize("element, K, V, state", KINDS)
def test_the_scans_compile_and_fit(tmp_path, element, K, V, state):
    constants = {"H": 2, "HV": 4, "K": K, "V": V, "STAGES": scan_module.STAGES}
    types, constants = with_states(tiles_of(element), constants, ("initial_state", "final_state"), state)
    for module, kernel in ((scan_module, "hopper_scan_kernel"), (narrow_module, "hopper_narrow_scan_kernel")):
        check_built(built(tmp_path, getattr(module, kernel), types, constants | roles_of(module), module.REGISTERS))


@pytest.mark.parametrize("element, K, V, state", KINDS)
def test_the_maps_compile_and_two_fit(tmp_path, element, K, V, state):
    types = tiles_of(element) | {"M": descriptor([1, tiles.BK, hopper.NARROW], "bf16"), "B": "*fp32"}
    constants = {"H": 2, "HV": 4, "K": K, "V": V, "STAGES": maps_module.STAGES}
    types, constants = with_states(types, constants | roles_of(maps_module), ("enter",), state)
    result = built(tmp_path, maps_module.hopper_map_kernel, types, constants, maps_module.REGISTERS)
    check_built(result)
    assert 2 * (result[0] + 1024) <= CHIPS["sm_90"].shared_memory + 1024


@pytest.mark.parametrize("element, K, V, state", KINDS)
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("what", ["whole", "part", "maps"])
def test_both_scans_compile_and_fit(tmp_path, element, K, V, state, programs, what):
    maps = what == "maps"
    V = 256 if V == 200 and not maps else V
    constants = {"H": 2, "HV": 4, "K": K, "V": V, "PARTS": programs, "STAGES": 4 - programs, "MAP": maps}
    constants |= {"EARLY": what == "part", "IN_KEYS": 2 if K == 128 and not maps else 0} | roles_of(both_ways_module)
    types = tiles_of(element) | dict.fromkeys(("dq", "dk", "written"), descriptor([1, 1, CHUNK, tiles.BV], element))
    types, constants = with_states(types, constants, ("after",) if maps else ("before", "after"), state)
    types, constants = with_states(types, constants, ("leave",), state or maps)
    types, constants = with_states(types, constants, ("reached",), what == "part")
    nothing = ["written"] if (K, V) == (128, 128) else []
    if maps:
        nothing = ["v", "transition", "states", "written", "dq", "dk", "dstates", "X", "before"]
    types, constants = with_states(types, constants, nothing, False)
    types = {name: of for name, of in types.items() if name not in nothing}
    kernel = both_ways_module.hopper_both_ways_kernel
    check_built(built(tmp_path, kernel, types, constants, both_ways_module.REGISTERS), 128)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("HV, V", [(4, 128), (2, 256), (4, 256), (6, 384)])
@pytest.mark.parametrize("later", [True, False], ids=["later", "all at once"])
def test_the_gradients_compile_and_fit(tmp_path, element, HV, V, later):
    wide = descriptor([1, 1, CHUNK, 128], element)
    types = tiles_of(element) | dict.fromkeys(("v", "do", "dv", "X"), wide) | dict.fromkeys(("dg", "dbeta"), "*fp32")
    module = gradients_module
    constants = {"H": 2, "HV": HV, "V": V, "IN_KEYS": 2} | roles_of(module)
    if (HV, V) == (4, 128):
        constants["written"] = None
    else:
        types["written"] = wide
    of_later = dict.fromkeys(("later_states", "later_dstates"))
    types, constants = (
        (types | dict.fromkeys(of_later, types["states"]), constants) if later else (types, constants | of_later)
    )
    check_built(built(tmp_path, module.hopper_gradient_kernel, types, constants, module.REGISTERS), 1024)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_inverse_compiles_and_seven_fit(tmp_path, element, backward):
    vectors = dict.fromkeys(("g", "beta", "c_sum", "from_start", "to_end", "rate", "erasing"), "*fp32")
    types = {
        "k": tiles_of(element)["k"],
        **vectors,
        **dict.fromkeys(("scaled", "inverse"), f"*{element}"),
        **dict.fromkeys(("T", "stride_g_b", "stride_g_h", "stride_beta_b", "stride_beta_h"), "i32"),
        **dict.fromkeys((*tiles.Chunks._fields, *SQUARES), "i32"),
    }
    constants = {"H": 2, "HV": 4, "SCALE": 1.0 if backward else STRETCH, "stride_g_t": 4, "stride_beta_t": 8}
    constants["EARLY"] = not backward
    types, constants = with_states(types, constants, ("rate", "erasing"), backward)
    if not backward:
        constants["inverse"] = types.pop("inverse") and None
        types = {name: of for name, of in types.items() if name not in constants}
    shared, spilled, said = built(
        tmp_path, invert_module.hopper_invert_kernel, types, constants, invert_module.REGISTERS
    )
    check_built((shared, spilled, said))
    assert 7 * (shared + 1024) <= CHIPS["sm_90"].shared_memory + 1024


def test_the_steps_of_substitution_invert():
    """Lanes and registers, as a warp has them."""
    lane = torch.arange(32)
    A = torch.randn(16, 16, dtype=torch.float64).tril(-1)
    at = [(lane // 4 + r // 2 % 2 * 8, lane % 4 * 2 + r % 2 + r // 4 * 8) for r in range(8)]
    minus_a, y = ([x[i, j] for i, j in at] for x in (-A, torch.eye(16, dtype=A.dtype)))
    a_ij, y_j = {}, {}
    for kind, *which in invert_module.substitution_steps():
        if kind == "a":
            a_ij[which[0]] = minus_a[which[0]][lane // 4 * 4 + which[1]]
        elif kind == "y":
            y_j[which[0]] = y[which[0]][which[1] * 4 + lane % 4]
        else:
            y[which[0]] = y[which[0]] + a_ij[which[1]] * y_j[which[2]]
    inverse = torch.zeros_like(A)
    for (i, j), value in zip(at, y):
        inverse[i, j] = value
    assert_close(inverse, torch.linalg.inv(torch.eye(16, dtype=A.dtype) + A), 1e-12, "inverse")


def by_columns(run, x: dict, width: int) -> dict[str, torch.Tensor]:
    """What ``run(x, do, ds)`` gives, of heads with ``width`` columns of the values each, put together again."""
    n = x["v"].shape[3] // width
    do, ds = cotangents(x)
    v, do = (t.unflatten(3, (n, width)).flatten(2, 3) for t in (x["v"], do))
    state, ds = (t.unflatten(3, (n, width)).transpose(2, 3).flatten(1, 2) for t in (x["initial_state"], ds))
    gates = {name: x[name].repeat_interleave(n, 2) for name in ("g", "beta")}
    got = run({**x, **gates, "v": v, "initial_state": state}, do, ds)
    got |= {name: got[name].unflatten(2, (-1, n)).flatten(3) for name in ("o", "dv")}
    states = ("final_state", "dinitial_state")
    got |= {name: got[name].unflatten(1, (-1, n)).transpose(2, 3).flatten(3) for name in states}
    return got | {name: got[name].unflatten(2, (-1, n)).sum(3) for name in ("dg", "dbeta")}


def test_columns_of_values_meet_in_sums_alone():
    """A value head is as many heads as one likes, each with some of its columns, whose dq, dk, dg and dbeta add up."""
    x = make_inputs(2, 20, 2, 4, 8, 12, torch.float64, initial_state=True)

    def run(x, do, ds):
        return expected(x, do=do, ds=ds)

    whole, parts = run(x, *cotangents(x)), by_columns(run, x, 4)
    assert whole.keys() == parts.keys()
    for name in whole:
        assert_close(parts[name], whole[name], 1e-12, name)


def test_roles_alone_compile(tmp_path):
    shared, spilled, _ = built(tmp_path, roles_kernel, {"x": "*i32"}, {"BARRIERS": 20}, 64)
    assert shared < 64 and spilled == 0


def test_only_a_hopper_gpu_serves():
    x = make_inputs(1, 130, 1, 2, 128, 128, torch.bfloat16)
    assert not hopper.serves(x["q"], x["k"], x["v"], 0.1, None)


@pytest.mark.parametrize(
    "B, HV, V, segment, room",
    [
        (1, 32, 128, None, True),
        (1, 66, 128, None, True),
        (1, 33, 256, None, True),
        (1, 67, 128, None, False),
        (4, 32, 128, None, False),
        (1, 16, 128, 32, True),  # four segments, on the 132 multiprocessors of the chip
        (1, 8, 128, 16, True),
        (2, 4, 128, 16, True),
    ],
)
def test_which_scan_takes_a_call(B, HV, V, segment, room):
    q = torch.empty(B, 8192, 2, 128, dtype=torch.bfloat16, device="meta")
    v = torch.empty(B, 8192, HV, V, dtype=torch.bfloat16, device="meta")
    with as_if_on(CHIPS["sm_90"]):
        assert segment_length(q, v, None, columns=hopper.NARROW) == segment
        assert hopper.has_room(q, v, chunk_table(B, 8192, None, segment)) == room


@pytest.mark.parametrize(
    "B, T, HV, V, segment, parts",
    [
        (1, 8192, 32, 128, None, [42, 86]),
        (2, 8192, 16, 128, None, [42, 86]),
        (1, 32768, 32, 128, None, [34, 68, 136, 274]),
        (1, 6144, 32, 128, None, [32, 64]),
        (1, 6080, 32, 128, None, [95]),  # the first of two would be too short
        (1, 100, 32, 128, None, [2]),
        (1, 8192, 33, 128, None, [42, 86]),  # just half of the 132 multiprocessors
        (1, 8192, 34, 128, None, [128]),
        (1, 8192, 8, 128, 16, [128]),  # segments
    ],
)
def test_parts_of_a_sequence(B, T, HV, V, segment, parts):
    q = torch.empty(B, T, 2, 128, dtype=torch.bfloat16, device="meta")
    v = torch.empty(B, T, HV, V, dtype=torch.bfloat16, device="meta")
    with as_if_on(CHIPS["sm_90"]):
        assert hopper.parts(q, v, chunk_table(B, T, None, segment)) == parts


@pytest.mark.parametrize(
    "B, T, HV, V, steps",
    [
        (1, 8192, 16, 128, [21, 43 + 21, 43]),
        (2, 8192, 8, 128, [21, 43 + 21, 43]),
        (1, 8192, 8, 256, [21, 43 + 21, 43]),
        (1, 4160, 16, 128, [32 + 33]),  # the first of two would be too short
        (1, 6208, 16, 128, [16, 32 + 16, 33]),  # the middle one of 97 chunks is met in the second half
        (1, 100, 16, 128, [2]),
        (1, 60, 16, 128, [1]),
        (1, 8192, 17, 128, [128]),  # more than half of the 132 multiprocessors
        (1, 8192, 11, 128, [128]),  # segments
        (1, 8192, 12, 128, [21, 43 + 21, 43]),
    ],
)
def test_parts_of_the_backward(B, T, HV, V, steps):
    q = torch.empty(B, T, 1, 128, dtype=torch.bfloat16, device="meta")
    v = torch.empty(B, T, HV, V, dtype=torch.bfloat16, device="meta")
    with as_if_on(CHIPS["sm_90"]):
        assert hopper.steps_of_parts(q, v) == steps


@pytest.mark.parametrize("chunks", range(1, 9))
def test_two_walks_from_either_end(chunks):
    """Until they meet all chunks are passed, and from then on all again."""
    for halves in (range(0, chunks - chunks // 2 + 1), range(chunks // 2, chunks + 1)):
        passed = []
        for since, until in pairwise(halves):
            part = tiles.chunks_passed(since, until, chunks)
            end = part.count - part.of_since
            passed += [*range(part.since, part.since + part.of_since), *range(part.again, part.again + end)]
            assert set(passed[-part.count :]) == {since, chunks - until}
        assert sorted(passed) == list(range(chunks))


@pytest.mark.parametrize(
    "change, whole",
    [
        ({}, True),
        ({"V": 200, "gradients": False}, True),
        ({"V": 96, "gradients": False}, True),
        ({"V": 96}, False),
        ({"V": 256}, True),
        ({"V": 512}, True),
        ({"V": 640}, False),
        ({"V": 200}, False),
        ({"V": 320}, False),
        ({"V": 64}, False),
        ({"K": 64}, False),
        ({"K": 192}, False),
        ({"T": 8191}, False),
        ({"dtype": torch.float32}, False),
        ({"packed": True}, False),
    ],
    ids=str,
)
def test_what_a_compiled_graph_leaves_to_these_kernels(monkeypatch, change, whole):
    at = {"T": 8192, "K": 128, "V": 128, "dtype": torch.bfloat16, "packed": False, "gradients": True, **change}
    q, v = (torch.empty(1, at["T"], 8, at[width], dtype=at["dtype"], device="meta") for width in "KV")
    bounds = torch.empty(3, dtype=torch.int32, device="meta") if at["packed"] else None
    assert not hopper.serves_whole(q, v, bounds, at["gradients"])  # no such GPU
    monkeypatch.setattr(hopper, "is_for", lambda x: True)
    assert hopper.serves_whole(q, v, bounds, at["gradients"]) == whole
    with batch_invariant():
        assert not hopper.serves_whole(q, v, bounds, at["gradients"])


def test_graphs_are_not_made_of_these_kernels(monkeypatch):
    """Decided before a tensor is asked where its memory is: while a graph is traced it has none."""
    asked = []
    monkeypatch.setattr(hopper, "is_for", lambda x: True)
    monkeypatch.setattr(hopper, "_is_copied", lambda x: (asked.append(x), True)[1])
    q, k, v, do = torch.empty(4, 1, 130, 2, 128, dtype=torch.bfloat16, device="meta")
    with traced():
        assert not hopper.serves(q, k, v, 0.1, None)
        assert not hopper.serves_gradients(q, k, v, do, 0.1, None)
    assert not asked
    assert hopper.serves_gradients(q, k, v, do, 0.1, None)
    assert len(asked) == 4


@pytest.fixture(params=[narrow_module, scan_module], ids=["narrow", "wide"])
def calls(monkeypatch, request):
    """Every start of one of the two scans, which has all calls."""
    made, module = [], request.param
    name = module.__name__.rpartition(".")[2]
    original = getattr(module, name)

    def scan(*args, **kwargs):
        made.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, scan)
    monkeypatch.setattr(hopper, "has_room", lambda *args: module is narrow_module)
    return made


SHAPES = [
    (1, 9, 1, 2, 128, 128),
    (2, 63, 1, 2, 128, 128),
    (1, 64, 2, 2, 128, 128),
    (2, 65, 2, 4, 128, 128),
    (3, 130, 1, 3, 96, 72),
    (1, 1000, 2, 4, 128, 200),
    (1, 513, 1, 2, 80, 512),
    (1, 4096, 1, 2, 128, 128),  # cut into segments
]


@gpu
@on_hopper
@pytest.mark.parametrize("B, T, H, HV, K, V", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_agrees_with_the_specification_and_repeats(calls, dtype, B, T, H, HV, K, V, state):
    x = make_inputs(B, T, H, HV, K, V, dtype, "cuda", initial_state=state)
    got, again = forward(x), forward(x)
    assert len(calls) == 2
    assert_all_close(got, expected(x, scale_of(x)), dtype)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert torch.equal(forward(x, output_final_state=False)["o"], got["o"])


@gpu
@on_hopper
@pytest.mark.parametrize("gate", [0.0, -0.05, -5.0, -1e4, float("-inf")])
def test_gates(calls, gate):
    x = make_inputs(1, 300, 1, 2, 128, 128, torch.bfloat16, "cuda", initial_state=True)
    x["g"] = torch.full_like(x["g"], gate)
    x["g"][:, 100:140] *= 0.01 if gate > float("-inf") else 1.0
    got = forward(x)
    assert calls
    if gate > float("-inf"):
        assert_all_close(got, expected(x, scale_of(x)), torch.bfloat16)
    else:
        assert all(value.isfinite().all() for value in got.values())
        assert not got["final_state"].isnan().any()


@gpu
@on_hopper
def test_agrees_with_its_twin(calls, monkeypatch):
    """Compiled graphs and packages hold the portable scan."""
    x = make_inputs(2, 1000, 2, 4, 128, 128, torch.bfloat16, "cuda", initial_state=True)
    here = forward(x)
    compiled = dict(
        zip(here, torch.compile(gdn_ops.chunk_gated_delta_rule, fullgraph=True)(**x, output_final_state=True))
    )
    monkeypatch.setattr(hopper, "serves", lambda *args: False)
    there = forward(x)
    assert len(calls) == 1
    for name in here:
        assert_close(here[name], there[name], 5e-4, name)
        assert_close(compiled[name], there[name], 5e-4, name)


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, K, V", [(2, 1000, 2, 4, 128, 128), (1, 4100, 1, 2, 96, 200), (1, 70, 1, 1, 72, 72)]
)
def test_both_scans_give_the_same_bits(monkeypatch, B, T, H, HV, K, V):
    x = make_inputs(B, T, H, HV, K, V, torch.bfloat16, "cuda", initial_state=True)
    got = []
    for narrow in (True, False):
        monkeypatch.setattr(hopper, "has_room", lambda *args, narrow=narrow: narrow)
        got.append(forward(x))
    assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])


@gpu
@on_hopper
@pytest.mark.parametrize("B, T, H, HV, V", [(1, 6000, 4, 24, 128), (2, 700, 2, 4, 200), (5, 64 * 15, 1, 3, 256)])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_parts_give_the_same_bits(monkeypatch, B, T, H, HV, V, state):
    """Started one after the other without a stop, so that one that began too early would show."""
    x = make_inputs(B, T, H, HV, 128, V, torch.bfloat16, "cuda", initial_state=state)
    patched = "gdn_ops.kernels.triton.chunk_forward.segment_length"
    monkeypatch.setattr(patched, lambda *args, **kwargs: None)
    monkeypatch.setattr(hopper, "SHORTEST_PART", 1 << 20)
    whole = forward(x)
    monkeypatch.setattr(hopper, "SHORTEST_PART", 1)
    parts = [forward(x) for _ in range(10)]
    assert all(torch.equal(whole[name], part[name]) for part in parts for name in whole)


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, K, V",
    [(1, 6000, 8, 16, 128, 128), (2, 1500, 2, 6, 128, 128), (1, 900, 3, 3, 96, 256), (1, 64 * 33, 1, 2, 128, 384)],
)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_parts_of_the_backward_give_the_same_bits(monkeypatch, B, T, H, HV, K, V, state):
    """Started one after the other without a stop, so that one that began too early would show."""
    x = make_inputs(B, T, H, HV, K, V, torch.bfloat16, "cuda", initial_state=state)
    do, ds = cotangents(x)

    def run() -> tuple[torch.Tensor, ...]:
        return chunk_backward(do, ds if state else None, *arguments_of(x), scale_of(x))

    monkeypatch.setattr("gdn_ops.kernels.hopper.backward.segment_length", lambda *args, **kwargs: None)
    monkeypatch.setattr(hopper, "FEWEST_PROGRAMS", 0)
    whole = run()
    monkeypatch.setattr(hopper, "FEWEST_PROGRAMS", 1000)
    monkeypatch.setattr(hopper, "SHORTEST_STEPS", 1)
    assert len(hopper.steps_of_parts(x["q"], x["v"])) > 3
    for parts in [run() for _ in range(10)]:
        assert all(map(torch.equal, whole, parts))


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, K, V", [(1, 2048, 16, 32, 128, 128), (3, 64 * 31, 4, 8, 128, 256), (2, 1500, 8, 24, 96, 128)]
)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_sparing_states_gives_the_same_bits_in_less_memory(monkeypatch, B, T, H, HV, K, V, state):
    x = make_inputs(B, T, H, HV, K, V, torch.bfloat16, "cuda", initial_state=state)
    do, ds = cotangents(x)

    def run(least: int) -> tuple[tuple[torch.Tensor, ...], int]:
        monkeypatch.setattr(hopper, "LEAST_TO_SPARE", least)
        monkeypatch.setattr(hopper, "SHORTEST_STEPS", 1)
        return with_memory(partial(chunk_backward, do, ds if state else None, *arguments_of(x), scale_of(x)))

    whole, peak = run(1 << 60)
    for parts, less in [run(0) for _ in range(5)]:
        assert all(map(torch.equal, whole, parts))
        assert less < peak - B * (T // CHUNK) * HV * V * K * 2 * 2 // 3


@gpu
@on_hopper
@pytest.mark.parametrize("B, T, H, HV, K, V", [(1, 1000, 2, 4, 128, 128), (2, 300, 1, 2, 96, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_maps_are_the_portable_ones(dtype, B, T, H, HV, K, V, state):
    x = make_inputs(B, T, H, HV, K, V, dtype, "cuda", initial_state=state)
    x["g"] = x["g"] * 0.01  # or a map of the state is nearly zero
    table = chunk_table(B, T, None, 2)
    inverse = invert_module.invert(x["k"], x["g"], x["beta"], table)
    here, there = (
        maps(inverse, x["k"], x["v"], table, x["initial_state"]) for maps in (maps_module.maps, portable_maps)
    )
    check_maps(here, there, table, 1e-4)


@gpu
@on_hopper
def test_strides_and_what_is_left_to_the_portable_scan(calls):
    dense = make_inputs(2, 200, 2, 4, 128, 128, torch.bfloat16, "cuda")
    want = forward(dense)
    assert len(calls) == 1
    heads_first = {**dense, **{n: dense[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}}
    assert all(torch.equal(want[name], value) for name, value in forward(heads_first).items())
    one = torch.cat([dense[n].flatten(2) for n in "qkv"], dim=-1)
    parts = dict(zip("qkv", one.split([256, 256, 512], dim=-1)))
    cut = {**dense, **{n: parts[n].unflatten(-1, (-1, 128)) for n in "qkv"}}
    assert all(torch.equal(want[name], value) for name, value in forward(cut).items())
    assert len(calls) == 3
    with batch_invariant():
        forward(dense)
    repeated = {**dense, "v": dense["v"][:, :, :1].expand(-1, -1, 4, -1)}
    forward(repeated)
    odd = torch.empty(dense["q"].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
    forward({**dense, "q": odd.copy_(dense["q"].flatten()).view_as(dense["q"])})
    assert len(calls) == 3


@gpu
@on_hopper
def test_nothing_leaks(calls):
    """What follows the last token of a sequence lies right behind it in memory; outputs end where the tensor does."""
    x = make_inputs(3, 70, 1, 2, 128, 128, torch.bfloat16, "cuda", initial_state=True)
    want = forward(x)
    for name in "qkv":
        x[name][1] = float("nan")
    got = forward(x)
    assert calls
    for row in (0, 2):
        assert torch.equal(got["o"][row], want["o"][row])
        assert torch.equal(got["final_state"][row], want["final_state"][row])
    x = make_inputs(1, 300, 1, 1, 128, 128, torch.bfloat16, "cuda")
    want = forward(x)["o"]
    for name in "qkv":
        x[name][:, 192:] = float("nan")
    assert torch.equal(forward(x)["o"][:, :192], want[:, :192])


@gpu
@on_hopper
def test_inside_a_cuda_graph(calls):
    x = make_inputs(1, 600, 2, 4, 128, 128, torch.bfloat16, "cuda", initial_state=True)
    want = forward(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chunk_forward(*arguments_of(x), scale_of(x), True)
    for value in got:
        value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert len(calls) == 2
    assert all(map(torch.equal, want.values(), got))


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, K, V",
    [
        (2, 63, 1, 2, 128, 128),
        (1, 64, 2, 2, 128, 128),
        (2, 65, 2, 4, 96, 128),
        (3, 130, 1, 3, 128, 128),
        (1, 1000, 2, 8, 128, 128),
        (1, 4096, 1, 2, 80, 128),
        (2, 65, 2, 2, 128, 256),
        (1, 300, 3, 9, 128, 256),
        (3, 130, 2, 4, 96, 384),
        (2, 131, 1, 3, 128, 512),
        (1, 1600, 1, 1, 128, 512),  # cut into segments, with a warpgroup a program
        (1, 1600, 2, 6, 80, 256),  # the same with two
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_gradients(monkeypatch, dtype, B, T, H, HV, K, V, state):
    made = []
    original = gradients_module.prepared
    monkeypatch.setattr(gradients_module, "prepared", lambda *args: made.append(1) or original(*args))
    x = make_inputs(B, T, H, HV, K, V, dtype, "cuda", initial_state=state)
    first = check_chunk(x)
    again = chunk(x, *cotangents(x))
    assert len(made) == 2
    assert all(torch.equal(first[name], again[name]) for name in first)


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, V, segment",
    [
        (4, 512, 4, 8, 128, None),
        (4, 512, 4, 8, 256, None),
        (1, 4096, 2, 4, 128, 8),  # alone, a head is cut as it is in company
    ],
)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_groups_give_the_same_bits_in_less_memory(monkeypatch, B, T, H, HV, V, segment, state):
    started = []
    original = gradients_module.prepared
    monkeypatch.setattr(gradients_module, "prepared", lambda *args: started.append(1) or original(*args))
    x = make_inputs(B, T, H, HV, 128, V, torch.bfloat16, "cuda", initial_state=state)
    do, ds = cotangents(x)
    assert segment_length(x["q"], x["v"], None, ways=2) == segment
    size = B * (T // CHUNK) * HV * V * (2 * 128 + CHUNK) * 2

    def run(largest: int | None, groups: int) -> tuple[tuple[torch.Tensor, ...], int]:
        started.clear()
        with cutting(largest_group=largest):
            grads, most = with_memory(partial(chunk_backward, do, ds, *arguments_of(x), scale_of(x)))
        assert len(started) == groups
        return grads, most

    whole, peak = run(None, 1)
    for largest, groups in ((size // 2, 2), (1, B * H)):
        parts, less = run(largest, groups)
        assert all(map(torch.equal, whole, parts))
        assert less < peak - size // 4


@gpu
@on_hopper
@pytest.mark.parametrize("B, T, H, HV, V", [(2, 130, 1, 2, 256), (1, 300, 2, 4, 384), (1, 2000, 1, 1, 512)])
def test_wide_values_are_heads_of_128(B, T, H, HV, V):
    x = make_inputs(B, T, H, HV, 128, V, torch.bfloat16, "cuda", initial_state=True)
    whole, parts = chunk(x, *cotangents(x)), by_columns(chunk, x, 128)
    for name in whole:
        assert_close(parts[name], whole[name], 1e-4, name)


@gpu
@on_hopper
@pytest.mark.parametrize("V", [128, 256])
def test_gradients_of_strided_tokens(V):
    """Heads that are further apart than they are wide."""
    x = make_inputs(2, 200, 2, 4, 128, V, torch.bfloat16, "cuda", initial_state=True)
    do, ds = cotangents(x)
    want = chunk(x, do, ds)
    apart = {n: torch.cat([x[n], -x[n]], dim=-1)[..., : x[n].shape[3]] for n in "qkv"}
    got = chunk({**x, **apart}, torch.cat([-do, do], dim=-1)[..., V:], ds)
    assert all(torch.equal(got[name], want[name]) for name in want)


@gpu
@on_hopper
@pytest.mark.parametrize(
    "B, T, H, HV, K, case",
    [
        (1, 1, 1, 2, 128, "random"),
        (2, 9, 1, 2, 128, "random"),
        (2, 63, 1, 2, 128, "random"),
        (1, 64, 1, 2, 128, "random"),
        (1, 1000, 2, 4, 128, "random"),
        (3, 65, 2, 4, 80, "random"),
        (3, 65, 2, 4, 80, "strided"),
        (3, 65, 2, 4, 80, "16-bit gates"),
        (3, 65, 2, 4, 80, "infinite"),
        (2, 130, 1, 3, 128, "one key"),
        (2, 130, 1, 3, 128, "one key 1.9"),
        (2, 130, 1, 3, 128, "strong"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_inverses(dtype, B, T, H, HV, K, case, backward):
    x, table = inverse_inputs(B, T, H, HV, K, case, dtype, "cuda"), chunk_table(B, T, None, None)
    here = invert_module.invert(x["k"], x["g"], x["beta"], table, backward)
    check_inverse(here, intra_chunk(x["k"], x["k"], x["g"], x["beta"], table, 1.0, backward), case)
    again = invert_module.invert(x["k"], x["g"], x["beta"], table, backward)
    assert all(torch.equal(getattr(again, n), getattr(here, n)) for n in ("T", "from_start", "to_end"))
