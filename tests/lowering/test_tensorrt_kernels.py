"""The plugin kernels against the specification: interpreted on the CPU, and as PTX through the CUDA driver on a GPU.

The second is the ABI proof: the kernel is compiled as the plugin compiles it, and started by ``cuLaunchKernel`` with
the arguments, the grid, the threads and the shared memory that the declaration gives, and nothing else.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gdn_ops.lowering.tensorrt import onnx_plugins, plugins
from gdn_ops.lowering.tensorrt.compile import (
    SHARED_MEMORY,
    Compiled,
    compile_kernel,
    entry_parameters,
    exact_parameters,
)
from gdn_ops.lowering.tensorrt.declaration import CHUNK, CONV, PLUGINS, PluginKernel, cdiv
from gdn_ops.lowering.tensorrt.kernels import launch

from gdn_ops import reference
from tests import oracle
from tests.kernels.interpreter import call

RULES = ("recurrent_gated_delta_rule", "recurrent_gated_delta_rule_in_place", "chunk_gated_delta_rule")
SCALE, ARCHES = 0.3, (80, 89, 90, 100, 120)
# B, T, H, HV, K, V: one token, a chunk and its neighbours, grouped heads, sizes that are no powers of two.
SHAPES = (
    (2, 1, 2, 4, 16, 24),
    (1, CHUNK - 1, 1, 1, 16, 16),
    (2, CHUNK + 1, 2, 2, 24, 8),
    (1, 70, 1, 3, 32, 40),
    (1, 40, 1, 1, 140, 16),
)
LARGE = ((2, 1, 4, 8, 128, 128), (3, 200, 4, 8, 128, 128), (1, 1000, 2, 4, 64, 96), (2, 65, 1, 2, 200, 256))
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())


def rule_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    inputs = oracle.make_inputs(*shape, dtype, device, seed=seed, initial_state=True)
    return [inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]


def rule_expected(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    wide = [x.cpu().double() for x in inputs]
    return list(reference.gated_delta_rule(*wide[:5], scale=SCALE, initial_state=wide[5]))


def check_rule(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for x, want, name in zip(got, expected, ("o", "final_state"), strict=True):
        oracle.assert_close(x, want, oracle.TOLERANCE[dtype].values, name)


def conv_inputs(B: int, T: int, D: int, W: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    inputs = oracle.make_conv_inputs(B, T, D, W, dtype, device, initial_state=True)
    return [inputs[name] for name in ("x", "weight", "bias", "initial_state")]


def conv_expected(inputs: list[torch.Tensor], silu: int) -> list[torch.Tensor]:
    wide = [x.cpu().double() for x in inputs]
    return list(reference.causal_conv1d(*wide, activation="silu" if silu else None))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_a_rule_kernel_gives_the_specifications_numbers(name, shape, dtype):
    inputs = rule_inputs(shape, dtype)
    expected = rule_expected(inputs)
    got = call("gdn_ops.lowering.tensorrt.kernels:launch", name, {"scale": SCALE}, *inputs)
    check_rule(got.result, expected, dtype)
    if name.endswith("in_place"):
        after = got.args[2 + 5]
        assert torch.equal(after, got.result[1]), "the state that was given is the one that came"


@every_dtype
def test_strong_gates_and_repeated_keys(dtype):
    """A gate of -1e4 or -inf is an exact zero; keys that repeat with beta near 1 and no decay stay accurate."""
    inputs = rule_inputs((1, 70, 1, 2, 32, 16), dtype, seed=3)
    k, g, beta = inputs[1], inputs[3], inputs[4]
    g[:, 20], g[:, 40, 0], g[:, 50:] = -1.0e4, float("-inf"), -1e-6
    k[:, 50:] = k[:, 50:51]
    beta[:, 50:] = 0.999
    got = call("gdn_ops.lowering.tensorrt.kernels:launch", "chunk_gated_delta_rule", {"scale": SCALE}, *inputs)
    check_rule(got.result, rule_expected(inputs), dtype)


@pytest.mark.parametrize("silu", [0, 1])
@pytest.mark.parametrize(("B", "T", "D", "W"), [(2, 1, 40, 4), (1, 2, 130, 4), (2, 33, 48, 3), (1, 20, 36, 2)])
@every_dtype
def test_the_convolution_gives_the_specifications_numbers(B, T, D, W, silu, dtype):
    inputs = conv_inputs(B, T, D, W, dtype)
    got = call("gdn_ops.lowering.tensorrt.kernels:launch", "causal_conv1d", {"silu": silu}, *inputs)
    for x, want, name in zip(got.result, conv_expected(inputs, silu), ("y", "final_state"), strict=True):
        oracle.assert_close(x, want, oracle.TOLERANCE[dtype].values, name)


def test_sizes_stay_arguments_when_torch_launches():
    for kernel in PLUGINS.values():
        kept = [x.name for x in kernel.triton().params if x.do_not_specialize]
        assert kept == list(kernel.extras)


def test_wrong_inputs_are_named():
    q, k, v, g, beta, state = rule_inputs((1, 5, 2, 4, 16, 16), torch.float32)
    for inputs, told in (
        ([q, k[:, :4], v, g, beta, state], r"k: expected T = 5 as before, got 4"),
        ([q, k, v[0], g, beta, state], r"v: expected shape .* got 3 dimensions"),
        ([q, k, v[:, :, :3].contiguous(), g[..., :3], beta[..., :3], state[:, :3]], r"v: expected a multiple of the 2"),
        ([q.transpose(1, 2).contiguous().transpose(1, 2), k, v, g, beta, state], r"q: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=told):
            launch("chunk_gated_delta_rule", {"scale": 1.0}, inputs[0], *(x.contiguous() for x in inputs[1:]))
    for inputs, told in (
        ([q, k.half(), v, g, beta, state], "k: expected float32, got float16"),
        ([q.double(), k, v, g, beta, state], "q: expected float32 or float16 or bfloat16, got float64"),
        ([q, k, v, g, beta, state.half()], "initial_state: expected float32, got float16"),
    ):
        with pytest.raises(TypeError, match=told):
            launch("recurrent_gated_delta_rule", {"scale": 1.0}, *inputs)
    x, weight, bias, state = conv_inputs(1, 5, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="initial_state: expected 3 inputs a channel, got 2"):
        launch("causal_conv1d", {"silu": 0}, x, weight, bias, state[..., :2].contiguous())


def case_of(kernel: PluginKernel, dtype: str, heads: tuple[int, ...] = (2, 4, 32, 32)) -> tuple[dict, dict, dict]:
    """Static sizes, dtypes by letter and attributes at which a kernel is compiled: gates are fp32."""
    dtypes = {x.dtype: dtype for x in kernel.inputs if x.free}
    if kernel is CONV:
        return {"D": 96, "W": 4, "S": 3}, dtypes, {"silu": 1}
    return dict(zip(("H", "HV", "K", "V"), heads)), {**dtypes, "g": "float32", "b": "float32"}, {"scale": SCALE}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["recurrent_gated_delta_rule", "chunk_gated_delta_rule", "causal_conv1d"])
def test_the_ptx_has_the_declared_parameters_and_no_others(name, dtype, arch):
    kernel = PLUGINS[name]
    sizes, dtypes, attributes = case_of(kernel, dtype)
    compiled = compile_kernel(kernel, sizes, dtypes, attributes, arch)
    parameters = entry_parameters(compiled.ptx, compiled.name)
    assert [kind for _, kind in parameters] == [
        *[".u64"] * len(kernel.inputs), *[".u32"] * len(kernel.extras), *[".u64"] * len(kernel.outputs),
    ]  # fmt: skip
    assert [x for x, _ in parameters] == [f"{compiled.name}_param_{i}" for i in range(len(parameters))]
    assert f".target sm_{arch}" in compiled.ptx
    assert compiled.threads % 32 == 0 and compiled.shared_memory <= SHARED_MEMORY


@pytest.mark.parametrize(("dtype", "K"), [("bfloat16", 128), ("bfloat16", 256), ("float32", 256)])
def test_large_heads_stay_below_the_shared_memory_of_any_launch(dtype, K, monkeypatch):
    kernel = PLUGINS["chunk_gated_delta_rule"]
    case = case_of(kernel, dtype, (2, 4, K, K))
    compiled = compile_kernel(kernel, *case, 90)
    assert compiled.shared_memory <= SHARED_MEMORY == 48 * 1024
    monkeypatch.setattr("gdn_ops.lowering.tensorrt.compile.SHARED_MEMORY", compiled.shared_memory - 1)
    with pytest.raises(
        RuntimeError, match=rf"expected {compiled.shared_memory - 1} bytes .* got {compiled.shared_memory}"
    ):
        compile_kernel(kernel, *case, 90)


def test_scratch_pointers_go_only_if_nothing_reads_them():
    ptx = (
        ".visible .entry f(\n\t.param .u64 .ptr .global .align 16 f_param_0,\n\t.param .u32 f_param_1,\n"
        "\t.param .u64 .ptr .global .align 1 f_param_2\n)\n.reqntid 32\n{\n\tld.param.u64 %rd1, [f_param_0];\n%s\n}\n"
    )
    declared = [("x", "*float32"), ("T", "int32")]
    kept = exact_parameters(ptx.replace("%s", ""), "f", declared)
    assert entry_parameters(kept, "f") == [("f_param_0", ".u64"), ("f_param_1", ".u32")]
    assert kept.split(")", 1)[1] == ptx.replace("%s", "").split(")", 1)[1]
    with pytest.raises(RuntimeError, match="f: expected a kernel without scratch memory, but it reads f_param_2"):
        exact_parameters(ptx.replace("%s", "\tld.param.u64 %rd2, [f_param_2];"), "f", declared)
    with pytest.raises(RuntimeError, match=r"f: expected parameters \['\.u64', '\.u64'\], got \['\.u64', '\.u32'"):
        exact_parameters(ptx.replace("%s", ""), "f", [("x", "*float32"), ("y", "*float32")])
    with pytest.raises(RuntimeError, match="g: expected an entry of that name"):
        entry_parameters(ptx, "g")


def test_a_declaration_that_is_not_the_kernels_is_refused():
    from dataclasses import replace

    kernel = PLUGINS["recurrent_gated_delta_rule"]
    swapped = replace(kernel, inputs=(kernel.inputs[1], kernel.inputs[0], *kernel.inputs[2:]))
    with pytest.raises(RuntimeError, match=r"recurrent_gated_delta_rule: expected parameters .*'k', 'q'"):
        compile_kernel(swapped, *case_of(kernel, "float32"), 90)


class Driver:
    """The few calls of libcuda that start a kernel from PTX; torch holds the context."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{what}: {text.value.decode() if text.value else status}")

    def start(self, compiled: Compiled, grid: int, arguments: list[torch.Tensor | int]) -> None:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        ptx = ctypes.create_string_buffer(compiled.ptx.encode())
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), ptx), "cuModuleLoadData")
        try:
            found = self.cuda.cuModuleGetFunction(ctypes.byref(function), module, compiled.name.encode())
            self.check(found, "cuModuleGetFunction")
            values = [ctypes.c_int32(x) if isinstance(x, int) else ctypes.c_uint64(x.data_ptr()) for x in arguments]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
            one, stream = ctypes.c_uint(1), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            started = self.cuda.cuLaunchKernel(
                function, ctypes.c_uint(grid), one, one, ctypes.c_uint(compiled.threads), one, one,
                ctypes.c_uint(compiled.shared_memory), stream, pointers, None,
            )  # fmt: skip
            self.check(started, "cuLaunchKernel")
            torch.cuda.synchronize()
        finally:
            self.cuda.cuModuleUnload(module)


def through_the_driver(name: str, inputs: list[torch.Tensor], attributes: dict) -> list[torch.Tensor]:
    """As TensorRT would: static sizes and dtypes compile the kernel, dynamic ones come with the launch."""
    kernel, (major, minor) = PLUGINS[name], torch.cuda.get_device_capability()
    sizes = kernel.bind_sizes([tuple(x.shape) for x in inputs])
    dtypes = kernel.bind_dtypes([str(x.dtype).removeprefix("torch.") for x in inputs])
    static = {size: value for size, value in sizes.items() if size not in kernel.extras}
    compiled = compile_kernel(kernel, static, dtypes, attributes, 10 * major + minor)
    by_name = {x.name: tensor for x, tensor in zip(kernel.inputs, inputs)}
    outputs = []
    for x in kernel.outputs:
        shape, dtype = [sizes[n] for n in x.shape], getattr(torch, kernel.dtype_of(x, dtypes))
        fresh = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        outputs.append(by_name[kernel.aliases[x.name]] if x.name in kernel.aliases else fresh)
    grid = kernel.grid(sizes, compiled.constants, cdiv)
    Driver().start(compiled, grid, [*inputs, *(sizes[x] for x in kernel.extras), *outputs])
    return outputs


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", (*SHAPES, *LARGE), ids=str)
@every_dtype
def test_the_ptx_of_a_rule_runs_with_the_declared_arguments(name, shape, dtype):
    inputs = rule_inputs(shape, dtype, "cuda")
    expected = rule_expected(inputs)
    check_rule(through_the_driver(name, inputs, {"scale": SCALE}), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "D", "W"), [(2, 1, 40, 4), (3, 33, 48, 3), (2, 1000, 4096, 4)])
@every_dtype
def test_the_ptx_of_the_convolution_runs_with_the_declared_arguments(B, T, D, W, dtype):
    inputs = conv_inputs(B, T, D, W, dtype, "cuda")
    expected = conv_expected(inputs, 1)
    got = through_the_driver("causal_conv1d", inputs, {"silu": 1})
    for x, want, name in zip(got, expected, ("y", "final_state"), strict=True):
        oracle.assert_close(x, want, oracle.TOLERANCE[dtype].values, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(2, 100, 2, 4, 64, 64), (1, 1, 2, 4, 64, 64)], ids=str)
@every_dtype
def test_a_launch_from_torch_gives_the_same_bits_as_one_through_the_driver(name, shape, dtype):
    """The just-in-time implementation is the same kernel with the same constants."""
    first = launch(name, {"scale": SCALE}, *rule_inputs(shape, dtype, "cuda"))
    second = through_the_driver(name, rule_inputs(shape, dtype, "cuda"), {"scale": SCALE})
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
@every_dtype
def test_memory_of_others_is_seen_by_torch(dtype):
    x = torch.randn(3, 5, device="cuda").to(dtype)
    seen = plugins.view(x.data_ptr(), (3, 5), str(dtype).removeprefix("torch."))
    assert seen.dtype == x.dtype and seen.data_ptr() == x.data_ptr() and torch.equal(seen, x)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 70])
@every_dtype
def test_the_plugins_of_the_onnx_parser_run_the_kernels(T, dtype):
    """``LinearAttention`` on packed heads, ``CausalConvWithState`` with channels first."""
    q, k, v, g, beta, state = inputs = rule_inputs((2, T, 2, 4, 32, 16), dtype, "cuda")
    outputs = [torch.full_like(v.flatten(2), float("nan")), torch.full_like(state, float("nan"))]
    fields = {"q_num_heads": 2, "kv_num_heads": 4, "scale": SCALE}
    onnx_plugins.linear_attention([*(x.flatten(2) for x in (q, k, v)), state, g, beta], outputs, fields)
    check_rule([outputs[0].unflatten(-1, (4, 16)), outputs[1]], rule_expected(inputs), dtype)
    x, weight, bias, state = inputs = conv_inputs(2, T, 40, 4, dtype, "cuda")
    outputs = [torch.full_like(x.transpose(1, 2).contiguous(), float("nan")), torch.full_like(state, float("nan"))]
    given = [x.transpose(1, 2).contiguous(), weight.unsqueeze(1), bias, state]
    onnx_plugins.causal_conv_with_state(given, outputs, {"activation": "silu"})
    for got, want, name in zip((outputs[0].transpose(1, 2), outputs[1]), conv_expected(inputs, 1), ("y", "state")):
        oracle.assert_close(got, want, oracle.TOLERANCE[dtype].values, name)
