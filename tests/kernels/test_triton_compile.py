"""Every Triton kernel, compiled for five chips that are not there, with what its launcher would choose on them.

Here each kernel is built once a chip, from a set of shapes that changes from chip to chip; ``compile_report`` builds
them all, and what it has recorded is held to the same bounds.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from gdn_ops.kernels.triton import causal_conv1d, chunk_forward, linear_attention  # noqa: E402
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on, chip_of  # noqa: E402
from gdn_ops.kernels.triton.compile_case import case_of_launch, cases_of_call  # noqa: E402
from gdn_ops.kernels.triton.segments import segment_length  # noqa: E402
from tests.kernels import compile_report as report  # noqa: E402

# Bytes a thread. 16-bit products run on tensor cores and leave room in the registers. fp32 products are exact ones,
# which Triton unrolls into fused multiply-adds: some of those kernels live in memory, and are slow rather than wrong.
SPILLS = {"bf16": 2048, "fp16": 2048, "fp32": 80_000, "": 0}
GROUPS = {
    "sm_80": ("chunk_forward", "chunk_backward", "fp32 64/64"),
    "sm_90": ("bf16 128/128",),
    "sm_100": ("bf16 64/64",),
    "sm_120": ("fp32 128/128",),
    "gfx942": ("bf16 128/128", "bf16 64/64"),
}
ALWAYS = (
    "causal_conv1d", "chunk_table", "recurrent", "chunk_forward", "chunk_backward", "linear_attention",
    "linear_attention_backward",
)  # fmt: skip
KERNELS = sorted({x.fn.__name__ for x in report.jit_functions() if x.fn.__name__.endswith("_kernel")})


def check(x: report.Build) -> None:
    assert not x.error, f"{x.kernel} ({x.case}) for {x.target}: {x.error}"
    assert x.shared_bytes <= CHIPS[x.target].shared_memory, report.line(x)
    assert x.spill_bytes <= SPILLS[x.dtype], report.line(x)
    assert 0 < x.registers <= (512 if x.target.startswith("gfx") else 255), report.line(x)


@pytest.mark.parametrize("target", report.TARGETS)
def test_every_kernel_has_a_case(target):
    """What ``@triton.jit`` decorates is a kernel with a case, by its name, or part of one."""
    cases = report.cases_of(target, tuple(report.groups())).values()
    parts = {id(function) for case in cases for function in report.called_by(case.kernel)}
    built = {id(case.kernel) for case in cases}
    for function in report.jit_functions():
        if function.fn.__name__.endswith("_kernel"):
            assert id(function) in built, f"{function.fn.__name__} has no case in ahead_of_time_cases()"
        else:
            assert id(function) in parts, f"{function.fn.__name__}: no kernel calls it; is it one without the name?"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", report.TARGETS)
def test_kernel_compiles_and_fits(target, kernel):
    cases = report.cases_of(target, (*GROUPS[target], *ALWAYS)).values()
    case = next(case for case in cases if case.kernel.fn.__name__ == kernel)
    check(report.build(case, target))


def test_scalars_may_be_fp64():
    """As a Python float is when Inductor launches a kernel; Triton itself passes fp32."""
    taken = {}
    for case in report.cases_of("sm_90", ALWAYS).values():
        if "fp32" in case.signature.values():
            taken.setdefault(case.kernel.fn.__name__, case)
    assert {"scan_kernel", "key_gradient_kernel", "recurrent_update_kernel", "linear_scan_kernel"} <= taken.keys()
    for case in taken.values():
        wide = {name: "fp64" if kind == "fp32" else kind for name, kind in case.signature.items()}
        check(report.build(case._replace(signature=wide), "sm_90"))


def overwritten(ttgir: str) -> set[str]:
    """Buffers of loads that a product may still be reading when the next copy lands in them.

    Triton (3.6 and 3.7) keeps one buffer fewer of a tile that is read into registers as well as by products, and none
    is to spare if products of an iteration may be pending where those of the next are issued.
    """
    found = set()
    for loop in re.findall(r"^( *)\S.* scf\.for .*\n((?:\1 .*\n)*)", ttgir, re.M):
        body = loop[1]
        if not re.search(r"warp_group_dot_wait .*pendings = [1-9]", body):
            continue
        products = re.findall(r"ttng\.warp_group_dot (%\S+), (%\S+),", body)
        read = set(re.findall(r"ttg\.local_load (%\S+)", body))
        for buffer in re.findall(r"(%\S+) = ttg\.local_alloc : \(\)", ttgir):
            views = {buffer}
            for view, of in re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%[\w#]+)", body):
                views |= {view} if of in views else set()
            if views & read and any(views & set(operands) for operands in products):
                found.add(buffer)
    return found


CHUNKED = ("linear_attention", "linear_attention_backward", "chunk_forward", "chunk_backward", "bf16 256/256")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if re.match("linear|score|scan|map|both|reverse|value|key", k)])
def test_products_in_flight_keep_their_operands(kernel):
    cases = [case for case in report.cases_of("sm_90", CHUNKED).values() if case.kernel.fn.__name__ == kernel]
    low = [case for case in cases if re.search("bf16|fp16", case.name)]
    assert low
    for case in low:
        assert not overwritten(report.compile_case(case, "sm_90")[0].asm["ttgir"]), case.name


@triton.jit
def _read_twice_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """The sum of products, and of what is multiplied, which takes its tiles to registers."""
    rows = tl.arange(0, BLOCK)
    square = rows[:, None] * BLOCK + rows[None, :]
    product = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, n):
        y_tile = tl.load(y + i * BLOCK * BLOCK + square)
        product = tl.dot(tl.load(x + i * BLOCK * BLOCK + square), y_tile, product)
        total += tl.sum(y_tile.to(tl.float32), axis=1)
    tl.store(out + square, product + total[:, None])


def test_an_operand_that_is_overwritten_is_found():
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    case = case_of_launch("bf16", _read_twice_kernel, {"x": x, "y": x, "out": x, "n": 9, "BLOCK": 64}, num_stages=2)
    assert len(overwritten(report.compile_case(case, "sm_90")[0].asm["ttgir"])) == 1


def test_a_kernel_that_does_not_fit_is_found():
    """The checks can fail: eight stages of a scan take more than any chip has."""
    with as_if_on(CHIPS["sm_90"]):
        case = next(c for c in report.groups()["bf16 128/128"]() if c.kernel.fn.__name__ == "scan_kernel")
    x = report.build(case._replace(num_stages=8), "sm_90")
    with pytest.raises(AssertionError):
        check(x)


def test_the_record_holds_every_kernel_on_every_chip_and_all_fit():
    rows = report.read(report.RECORD).values()
    assert {(x.target, x.kernel) for x in rows} >= {(t, k) for t in report.TARGETS for k in KERNELS}
    for x in rows:
        check(x)


def test_a_named_chip_is_answered_and_forgotten():
    x = torch.empty(1, device="meta")
    with as_if_on(CHIPS["gfx942"]):
        assert chip_of(x) == CHIPS["gfx942"]
        with pytest.raises(KeyError), as_if_on(CHIPS["sm_80"]):
            assert chip_of(x) == CHIPS["sm_80"]
            raise KeyError
        assert chip_of(x) == CHIPS["gfx942"]
    assert chip_of(x) == CHIPS["sm_90"]


@pytest.mark.parametrize("target", report.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_launch_tables_plan_within_the_chip(target, dtype):
    """No head size gets fewer than one stage or a tile that a state cannot be cut into."""
    x = torch.empty(1, dtype=dtype, device="meta")
    with as_if_on(CHIPS[target]):
        for K in (16, 24, 64, 100, 128, 192, 256):
            for V in (16, 40, 64, 128, 384, 512):
                for heads in (1, 64, 10_000, None):
                    for table in (chunk_forward.scan_configuration, linear_attention.linear_scan_configuration):
                        plan = table(x, K, V, heads)
                        assert plan["BK"] >= K and 16 <= plan["BV"] <= 128 and 1 <= plan["num_stages"] <= 3
                        if target == "sm_90" and dtype == torch.bfloat16:
                            assert plan["num_stages"] > 1, "Triton 3.6 miscompiles one stage of 16-bit operands there"


def test_small_chips_cut_no_wide_keys_into_segments():
    """combine_kernel's map of 128 columns takes more shared memory than gfx942 has."""
    x = torch.empty(1, 8192, 1, 128, dtype=torch.bfloat16, device="meta")
    lengths = {}
    for target in report.TARGETS:
        with as_if_on(CHIPS[target]):
            lengths[target] = segment_length(x, x, None)
    assert lengths.pop("gfx942") is None and all(lengths.values())


def test_case_is_specialised_as_a_launch_would_be():
    kernel = causal_conv1d.causal_conv1d_update_kernel
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    arguments = dict.fromkeys((parameter.name for parameter in kernel.params), 7)
    arguments |= {"x": x, "y": x[:, :, 1:], "bias": None, "stride_x_b": 192, "stride_x_d": 1, "P": 2**31}
    case = case_of_launch("step", kernel, {**arguments, "W": 4, "SILU": True}, num_warps=2)
    assert case.signature["x"] == "*bf16" and case.signature["T"] == "i32" and case.signature["P"] == "i64"
    assert {"x", "stride_x_b"} <= set(case.divisible_by_16) and not {"y", "T"} & set(case.divisible_by_16)
    assert case.constexprs["bias"] is None and case.constexprs["stride_x_d"] == 1 and case.constexprs["W"] == 4
    assert not set(case.signature) & set(case.constexprs) and (case.num_warps, case.num_stages) == (2, 3)
    with pytest.raises(TypeError, match="parameter T of step: a tensor, number or None expected"):
        case_of_launch("step", kernel, {**arguments, "T": "three"})


def test_recording_a_call_leaves_the_launchers_as_they_were():
    usual = causal_conv1d.launch
    with pytest.raises(AttributeError):
        cases_of_call("conv", causal_conv1d.forward, None, None, None, None, None, True, False)
    assert causal_conv1d.launch is usual
