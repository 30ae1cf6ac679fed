"""The plugins' registration, by TensorRT's own Python sources: signatures, shapes, dtypes, aliases, kernels, launches.

Where full TensorRT is installed the sources have their native half; elsewhere it is a stand-in
(``tensorrt_stand_in.py``), which computes symbolic sizes with integers.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from gdn_ops.lowering.tensorrt import plugins
from gdn_ops.lowering.tensorrt.declaration import CONV, PLUGINS, RECURRENT_IN_PLACE, cdiv

from tests.lowering import tensorrt_stand_in as stand_in

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    stand_in.plugin_sources() is None,
    reason="the Python sources of tensorrt.plugin are not installed: pip install --no-deps tensorrt-cu13-bindings",
)
RULE_SIZES = {"B": 3, "T": 70, "H": 2, "HV": 4, "K": 32, "V": 16}
CONV_SIZES = {"B": 3, "T": 70, "D": 200, "W": 4, "S": 3}
SIXTEEN = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def tensorrt():
    with stand_in.installed() as trt:
        yield trt, plugins.register.__wrapped__()


class Built:
    """One plugin as the builder drives it: dtypes, then shapes, then the launch."""

    def __init__(self, tensorrt, name: str, dtypes: dict[str, str], attributes: dict, fixed: tuple[str, ...] = ()):
        self.trt, trtp = tensorrt
        self.kernel = kernel = PLUGINS[name]
        self.sizes = CONV_SIZES if kernel is CONV else RULE_SIZES
        codes = {name: code for code, name in plugins.dtype_names(self.trt).items()}
        self.types = [codes[kernel.dtype_of(x, dtypes)] for x in kernel.inputs]
        tensors = [self.trt.ITensor() for _ in kernel.inputs]
        create = getattr(trtp.op.gdn, name)(*tensors, **attributes)
        given, nothing, self.plugin = create(self.trt.QuickPluginCreationRequest.PREFER_AOT)
        assert given == tensors and nothing == []
        self.output_types = self.plugin.get_output_data_types(self.types, [len(x.shape) for x in kernel.inputs])
        self.builder = stand_in.IExprBuilder()
        self.shapes = [
            [stand_in.IDimensionExpr(self.sizes[n], n not in kernel.extras or n in fixed) for n in x.shape]
            for x in kernel.inputs
        ]
        outputs = self.plugin.get_output_shapes(self.shapes, [], self.builder)
        self.output_shapes = [[size.value for size in shape] for shape in outputs]

    def launch(self):
        """``(kernel name, PTX, launch parameters, extra arguments)`` as the builder gets them."""
        described = []
        for dtype, shape in zip((*self.types, *self.output_types), (*self.shapes, *self.output_shapes)):
            inner = types.SimpleNamespace(type=dtype, format=self.trt.TensorFormat.LINEAR, scale=1.0, dims=shape)
            desc = self.trt.DynamicPluginTensorDesc()
            desc.desc = inner
            described.append(desc)
        parameters, extras = types.SimpleNamespace(), Extras()
        self.plugin.set_tactic(0)
        self.plugin.get_launch_params(self.shapes, described, len(self.types), parameters, extras, self.builder)
        inputs, outputs = (
            [x.desc for x in part] for part in (described[: len(self.types)], described[len(self.types) :])
        )
        return *self.plugin.get_kernel(inputs, outputs), parameters, extras


class Extras(dict):
    nbSymExprs = 0


def names(trt, dtypes) -> list[str]:
    return [plugins.dtype_names(trt)[x] for x in dtypes]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", [name for name in PLUGINS if name != "causal_conv1d"])
def test_a_rule_has_an_fp32_state_beside_16_bit_activations(tensorrt, name, dtype):
    built = Built(tensorrt, name, {"q": dtype, "g": "float32", "b": "float32"}, {"scale": 0.5})
    assert names(built.trt, built.output_types) == [dtype, "float32"]
    assert built.output_shapes == [[3, 70, 4, 16], [3, 4, 32, 16]]
    aliased = [built.plugin.get_aliased_input(i) for i in range(2)]
    assert aliased == ([-1, 5] if name == RECURRENT_IN_PLACE.name else [-1, -1])


def test_the_convolutions_outputs_have_the_inputs_dtype(tensorrt):
    built = Built(
        tensorrt, "causal_conv1d", {"x": "float16", "w": "float32", "b": "float32", "s": "float16"}, {"silu": 1}
    )
    assert names(built.trt, built.output_types) == ["float16", "float16"]
    assert built.output_shapes == [[3, 70, 200], [3, 200, 3]]


@pytest.mark.parametrize("name", list(PLUGINS))
def test_the_builder_gets_what_is_declared(tensorrt, name, monkeypatch):
    """Grid, threads, shared memory and extra arguments at sizes that the builder does not know."""
    from gdn_ops.lowering.tensorrt.compile import compile_kernel, entry_parameters

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    dtypes = dict.fromkeys("qxws", "bfloat16") | {"g": "float32", "b": "float32"}
    attributes = {"silu": 1} if name == "causal_conv1d" else {"scale": 0.5}
    built = Built(tensorrt, name, dtypes, attributes)
    kernel, ptx, parameters, extras = built.launch()
    static = {key: value for key, value in built.sizes.items() if key not in built.kernel.extras}
    compiled = compile_kernel(built.kernel, static, dtypes, attributes, 89)
    assert (kernel, ptx) == (compiled.name, compiled.ptx.encode())
    assert len(entry_parameters(ptx.decode(), kernel)) == len(built.types) + 2 + len(built.output_types)
    grid = built.kernel.grid(built.sizes, compiled.constants, cdiv)
    found = {key: value.expr.value for key, value in vars(parameters).items()}
    assert found == {
        "grid_x": grid, "grid_y": 1, "grid_z": 1, "block_x": compiled.threads, "block_y": 1, "block_z": 1,
        "shared_mem": compiled.shared_memory,
    }  # fmt: skip
    assert not parameters.grid_x.expr.constant, "the grid is a function of sizes that are not known yet"
    assert extras.nbSymExprs == 2 and [extras[i].expr.value for i in range(2)] == [3, 70]
    assert {extras[i].dtype for i in range(2)} == {built.trt.PluginArgDataType.INT32}


def test_a_size_that_must_be_fixed_is_named(tensorrt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    dtypes = {"q": "float16", "g": "float32", "b": "float32"}
    built = Built(tensorrt, "chunk_gated_delta_rule", dtypes, {"scale": 0.5})
    for shape in built.shapes:
        for size in shape:
            size.constant &= size.value != RULE_SIZES["V"]
    built.plugin.get_output_shapes(built.shapes, [], built.builder)
    with pytest.raises(ValueError, match=r"gdn::chunk_gated_delta_rule: expected a fixed size V, got a dynamic one"):
        built.launch()


def test_dtypes_that_are_refused(tensorrt):
    with pytest.raises(TypeError, match="initial_state: expected float32, got"):
        kernel, (trt, trtp) = PLUGINS["recurrent_gated_delta_rule"], tensorrt
        *_, plugin = getattr(trtp.op.gdn, kernel.name)(*[trt.ITensor() for _ in range(6)], scale=1.0)(
            trt.QuickPluginCreationRequest.PREFER_AOT
        )
        plugin.get_output_data_types([trt.float16] * 6, [len(x.shape) for x in kernel.inputs])


def test_the_just_in_time_plugin_launches_the_same_kernel(tensorrt, monkeypatch):
    trt, trtp = tensorrt
    kernel, sizes, called = PLUGINS["chunk_gated_delta_rule"], RULE_SIZES, []
    *_, plugin = trtp.op.gdn.chunk_gated_delta_rule(*[trt.ITensor() for _ in range(6)], scale=0.25)(
        trt.QuickPluginCreationRequest.STRICT_JIT
    )
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: called.append(stream))
    monkeypatch.setattr(plugins, "view", lambda address, shape, dtype: (address, shape, dtype))
    monkeypatch.setattr("gdn_ops.lowering.tensorrt.kernels.launch", lambda *a, **k: called.append((a, k)))

    def desc(argument):
        dtype = trt.bfloat16 if argument.dtype == "q" else trt.float32
        made = trt.PluginTensorDesc()
        made.type, made.format, made.scale = dtype, trt.TensorFormat.LINEAR, 1.0
        made.dims = tuple(sizes[name] for name in argument.shape)
        return made

    inputs, outputs = [desc(x) for x in kernel.inputs], [desc(x) for x in kernel.outputs]
    strides = [(1,)] * 6
    plugin.get_output_data_types([x.type for x in inputs], [len(x.dims) for x in inputs])
    plugin.enqueue(inputs, outputs, list(range(6)), [6, 7], strides, strides, 42)
    stream, ((name, attributes, *given), made) = called
    assert (stream, name, attributes) == (42, kernel.name, {"scale": 0.25})
    assert given[0] == (0, (3, 70, 2, 32), "bfloat16") and given[5] == (5, (3, 4, 32, 16), "float32")
    assert made == {"outputs": [(6, (3, 70, 4, 16), "bfloat16"), (7, (3, 4, 32, 16), "float32")]}


def test_a_network_gets_a_plugin_layer(tensorrt, monkeypatch):
    trt, trtp = tensorrt
    monkeypatch.setattr(plugins, "register", lambda: trtp)
    layer = types.SimpleNamespace(get_output=lambda i: f"out {i}")
    network = types.SimpleNamespace(add_plugin=lambda plugin, aot: layer if aot else None)
    inputs = [trt.ITensor() for _ in range(4)]
    assert plugins.add_plugin(network, "causal_conv1d", inputs, {"silu": True}) == ["out 0", "out 1"]
    with pytest.raises(RuntimeError, match="gdn::causal_conv1d: TensorRT made no plugin layer"):
        plugins.add_plugin(network, "causal_conv1d", inputs, {"silu": 0}, aot=False)
