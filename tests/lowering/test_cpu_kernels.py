"""The C++ kernels of AOTInductor packages against the specification, for every instruction set this machine can run."""

from __future__ import annotations

import shutil

import pytest
import torch
from gdn_ops.lowering import inductor

import gdn_ops
from gdn_ops import reference
from tests.lowering.shim_library import ShimLibrary
from tests.oracle import TOLERANCE, assert_close, expected, make_inputs, make_inputs_of

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")

SETS = inductor.instruction_sets()
CAPABILITY = {"baseline": "", "avx2": "AVX2", "avx512": "AVX512"}
SHAPES = {  # B, T, H, HV, K, V
    "one token": (2, 1, 2, 4, 32, 32),
    "below a chunk": (1, 63, 2, 2, 64, 64),
    "one chunk": (2, 64, 1, 2, 32, 48),
    "above a chunk": (1, 65, 2, 4, 128, 128),
    "ragged, odd sizes": (1, 201, 1, 3, 24, 40),
    "K and V of no tile": (2, 77, 1, 1, 7, 3),
    "no token": (2, 0, 1, 2, 16, 16),
}

RULES = [name for name in inductor.CPU_SHIMS if "gated" in name]
every_rule = pytest.mark.parametrize("name", RULES)


def inputs_of(name: str, *sizes, **options) -> dict:
    return make_inputs_of(getattr(gdn_ops, name), *sizes, **options)


def runs_here(name: str) -> bool:
    order = ["", "AVX2", "AVX512"]
    have = torch.backends.cpu.get_cpu_capability()
    return order.index(CAPABILITY[name]) <= (order.index(have) if have in order else 0)


@pytest.fixture(scope="session", params=[isa.name for isa in SETS])
def shims(request, tmp_path_factory) -> ShimLibrary:
    if not runs_here(request.param):
        pytest.skip(f"this processor has no {request.param}")
    count = [isa.name for isa in SETS].index(request.param) + 1
    return ShimLibrary(tmp_path_factory.mktemp("shims"), SETS[:count])


def rule(shims, name, inputs, scale=None, final=True):
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    return shims(name, *inputs.values(), scale, final)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_rule
def test_rule_against_the_specification(shims, name, shape, dtype):
    inputs = inputs_of(name, *shape, dtype=dtype, initial_state=True)
    o, final_state = rule(shims, name, inputs)
    ref = expected(inputs)
    assert o.dtype == dtype and o.is_contiguous()
    assert_close(o, ref["o"], TOLERANCE[dtype].values, "o")
    assert_close(final_state, ref["final_state"], TOLERANCE[dtype].values, "final_state")


@every_rule
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_with_empty_and_single_ones(shims, name, index):
    bounds = torch.tensor([0, 0, 1, 66, 66, 194, 200], dtype=index)
    inputs = inputs_of(name, 1, 200, 2, 4, 32, 16, initial_state=True, cu_seqlens=bounds)
    ref = expected(inputs)
    o, final_state = rule(shims, name, inputs)
    assert_close(o, ref["o"], 1e-5, "o")
    assert_close(final_state, ref["final_state"], 1e-5, "final_state")
    assert torch.equal(final_state[0], inputs["initial_state"][0])


def test_strides_as_they_come(shims):
    inputs = make_inputs(2, 70, 2, 4, 32, 16, initial_state=True)
    o, final_state = rule(shims, "chunk_gated_delta_rule", inputs)
    strided = {name: x if x is None else x.mT.contiguous().mT for name, x in inputs.items()}
    strided["v"] = torch.stack([inputs["v"], inputs["v"]], -1)[..., 0]
    strided["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided["initial_state"].is_contiguous() and not strided["g"].is_contiguous()
    other = rule(shims, "chunk_gated_delta_rule", strided)
    assert torch.equal(o, other[0]) and torch.equal(final_state, other[1])


def test_no_final_state_no_initial_state_and_scale(shims):
    inputs = make_inputs(2, 70, 1, 2, 16, 16)
    o, final_state = rule(shims, "chunk_gated_delta_rule", inputs, scale=0.5, final=False)
    assert final_state.shape == (0, 2, 16, 16) and final_state.dtype == torch.float32
    assert_close(o, expected(inputs, scale=0.5)["o"], 1e-5, "o")


def test_gates_of_another_dtype_than_the_inputs(shims):
    inputs = make_inputs(1, 70, 1, 2, 16, 16)
    inputs["g"], inputs["beta"] = inputs["g"].bfloat16(), inputs["beta"].double()
    o, _ = rule(shims, "chunk_gated_delta_rule", inputs)
    assert_close(o, expected(inputs)["o"], 1e-5, "o")


@pytest.mark.parametrize("gate", [-1e4, float("-inf")])
def test_strong_gates_without_erasing(shims, gate):
    inputs = inputs_of("chunk_gated_linear_attention", 1, 130, 1, 2, 32, 32, initial_state=True)
    inputs["g"][:, ::7] = gate
    ref = expected(inputs)
    o, final_state = rule(shims, "chunk_gated_linear_attention", inputs)
    assert_close(o, ref["o"], 1e-5, "o")
    assert_close(final_state, ref["final_state"], 1e-5, "final_state")


@pytest.mark.parametrize("gate", [-1e4, float("-inf")])
def test_strong_gates_and_repeated_keys(shims, gate):
    inputs = make_inputs(1, 130, 1, 2, 32, 32)
    inputs["g"][:, ::7] = gate
    ref = expected(inputs)
    o, final_state = rule(shims, "chunk_gated_delta_rule", inputs)
    assert_close(o, ref["o"], 1e-5, "o")
    assert_close(final_state, ref["final_state"], 1e-5, "final_state")
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["g"], inputs["beta"] = torch.full_like(inputs["g"], -1e-3), torch.full_like(inputs["beta"], 0.999)
    o, _ = rule(shims, "chunk_gated_delta_rule", inputs)
    assert_close(o, expected(inputs)["o"], 1e-5, "o, repeated keys")


def test_same_bits_twice_and_next_to_others(shims):
    inputs = make_inputs(3, 150, 2, 4, 32, 32, initial_state=True)
    o, final_state = rule(shims, "chunk_gated_delta_rule", inputs)
    again = rule(shims, "chunk_gated_delta_rule", inputs)
    assert torch.equal(o, again[0]) and torch.equal(final_state, again[1])
    alone = rule(shims, "chunk_gated_delta_rule", {n: x if x is None else x[1:2] for n, x in inputs.items()})
    assert torch.equal(o[1:2], alone[0]) and torch.equal(final_state[1:2], alone[1])


def conv_inputs(B, T, D, W, dtype=torch.float32, N=None):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, T, D), (D, W), (D,), (N or B, D, W - 1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [0, 1, 2, 64, 150])
def test_conv_against_the_specification(shims, T, W, dtype):
    x, weight, bias, state = conv_inputs(2, T, 37, W, dtype)
    wide = [t.double() for t in (x, weight, bias, state)]
    for silu in (False, True):
        y, final_state = shims("causal_conv1d", x, weight, bias, state, None, silu, True)
        ref, ref_state = reference.causal_conv1d(*wide, activation="silu" if silu else None)
        assert y.dtype == final_state.dtype == dtype
        assert_close(y, ref, TOLERANCE[dtype].values, "y")
        assert torch.equal(final_state.double(), ref_state)


def test_conv_packed_strided_without_bias(shims):
    bounds = torch.tensor([0, 2, 2, 90, 100])
    x, weight, _, state = conv_inputs(1, 100, 16, 4, N=4)
    x = x.mT.contiguous().mT
    y, final_state = shims("causal_conv1d", x, weight, None, state, bounds, True, True)
    ref, ref_state = reference.causal_conv1d(x, weight, None, state, "silu", bounds)
    assert_close(y, ref, 1e-5, "y")
    assert torch.equal(final_state, ref_state)
    y, final_state = shims("causal_conv1d", x, weight, None, None, bounds, False, False)
    assert_close(y, reference.causal_conv1d(x, weight, cu_seqlens=bounds)[0], 1e-5, "y")
    assert final_state.shape == (0, 16, 3)


def test_silu_at_the_ends_of_its_range(shims):
    x = torch.tensor([-1e30, -200.0, -88.0, -87.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 1e30]).view(1, -1, 1)
    y, _ = shims("causal_conv1d", x, torch.tensor([[0.0, 1.0]]), None, None, None, True, False)
    torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=2e-6, atol=2e-36)


def test_half_precision_conversions_are_exact(shims):
    """A convolution with the identity filter stores each of the 65536 values of a 16-bit type as it was read."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()].view(1, -1, 1)
        y, _ = shims("causal_conv1d", x, torch.tensor([[0.0, 1.0]], dtype=dtype), None, None, None, False, False)
        assert torch.equal(y, x)
        fine = (x.float()[:, :, 0] * 1.0007).view(1, -1, 1)  # the weight rounds in fp32, the result to 16 bits
        y, _ = shims("causal_conv1d", x, torch.tensor([[0.0, 1.0007]]), None, None, None, False, False)
        assert torch.equal(y, fine.to(dtype))
