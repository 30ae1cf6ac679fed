"""``build_tensorrt`` with full TensorRT, as far as the calls that it makes: the package is not to be had here, so
a stand-in takes them down. Where full TensorRT and a GPU are there, the last test builds and runs an engine."""

from __future__ import annotations

import types

import pytest
import torch

from tests.export import modules

onnx = pytest.importorskip("onnx", minversion="1.23")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("triton", reason="Triton is not installed")

import gdn_ops.lowering.tensorrt.plugins as quick  # noqa: E402
from gdn_ops.export import build_tensorrt, parity, tensorrt_runtime, verify  # noqa: E402

PROFILES = {"decode": {"batch": (1, 2, 4), "length": 1}, "prefill": {"batch": 1, "length": (1, 64, 100)}}
FLAGS = {"STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 3}


class Tensor:
    def __init__(self, value) -> None:
        self.name, kind = value.name, value.type.tensor_type
        self.dtype = onnx.TensorProto.DataType.Name(kind.elem_type)
        self.shape = [x.dim_value or -1 for x in kind.shape.dim]


class Layer:
    num_outputs = 0

    def __init__(self, node) -> None:
        self.name, self.type = node.name, types.SimpleNamespace(name=node.op_type)


class Stand:
    """``tensorrt`` in this test: it keeps what it is told in ``told`` and in its objects."""

    __version__ = "11.4.0"
    float32, float16, bfloat16, int64, int32, int8, bool = "FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "B"
    NetworkDefinitionCreationFlag = types.SimpleNamespace(**FLAGS)
    BuilderFlag = types.SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
    ProfilingVerbosity = types.SimpleNamespace(DETAILED="DETAILED")
    HardwareCompatibilityLevel = types.SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS", SAME_COMPUTE_CAPABILITY="SAME")
    ILogger = type("ILogger", (), {"WARNING": 2, "ERROR": 1, "__init__": lambda self: None})
    IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})

    def __init__(self, plan: bytes | None = b"plan") -> None:
        self.told, self.plan, self.graph = {"flags": []}, plan, None

    def Builder(self, logger):
        def build(network, config):
            config.progress_monitor.phase_start("Building engine", None, 1)
            assert config.progress_monitor.step_complete("Building engine", 0)
            logger.log(1, "the tactic  failed") if self.plan is None else logger.log(2, "slow")
            return self.plan

        return types.SimpleNamespace(
            create_network=lambda flags: self.told.update(network=flags),
            create_builder_config=self.config,
            create_optimization_profile=lambda: types.SimpleNamespace(
                set_shape=lambda *shapes: self.told.setdefault("shapes", []).append(shapes)
            ),
            build_serialized_network=build,
        )

    def OnnxParser(self, network, logger):
        def parse(path):
            self.graph = onnx.load(path)
            return True

        return types.SimpleNamespace(parse_from_file=parse)

    def config(self):
        cache = types.SimpleNamespace(serialize=lambda: b"new timings")

        def create(given):
            self.told["cache"] = given
            return None if given == b"of another GPU" else cache

        self.settings = types.SimpleNamespace(
            builder_optimization_level=3, clear_flag=lambda x: self.told["flags"].append(f"-{x}"),
            set_flag=lambda x: self.told["flags"].append(x), add_optimization_profile=lambda profile: 0,
            create_timing_cache=create, set_timing_cache=lambda cache, mismatch: True,
        )  # fmt: skip
        return self.settings


@pytest.fixture
def build(monkeypatch, tmp_path):
    def run(stand: Stand, **options):
        # A network, as far as it is looked at, is what was parsed.
        network = types.SimpleNamespace()
        monkeypatch.setattr(stand, "Builder", _with_network(stand, network), raising=False)
        runtime = tensorrt_runtime.Runtime("tensorrt", stand, stand.__version__, "full TensorRT is installed")
        monkeypatch.setattr(tensorrt_runtime, "find", lambda name: runtime)
        monkeypatch.setattr(quick, "register", lambda: stand.told.update(registered=True))
        return build_tensorrt(
            modules.Mixer(torch.float16), tmp_path / "out", example_inputs=modules.mixer_inputs(3, 70, torch.float16),
            dynamic_shapes=modules.mixer_shapes(), profiles=PROFILES, **options,
        )  # fmt: skip

    return run


def _with_network(stand, network):
    plain = stand.Builder

    class Network:
        num_inputs = property(lambda self: len(stand.graph.graph.input))
        num_outputs = property(lambda self: len(stand.graph.graph.output))
        num_layers = property(lambda self: len(stand.graph.graph.node))

        def get_input(self, i):
            return Tensor(stand.graph.graph.input[i])

        def get_output(self, i):
            return Tensor(stand.graph.graph.output[i])

        def get_layer(self, i):
            return Layer(stand.graph.graph.node[i])

    def builder(logger):
        made = plain(logger)
        create = made.create_network
        made.create_network = lambda flags: (create(flags), Network())[1]
        return made

    return builder


def test_the_plugins_are_in_the_network_and_the_options_in_the_builder(build, tmp_path):
    stand, cache = Stand(), tmp_path / "timings"
    cache.write_bytes(b"old timings")
    result = build(
        stand, timing_cache=cache, hardware_compatible="ampere_plus", version_compatible=True, optimization_level=5
    )
    assert stand.told["registered"] and stand.told["network"] == sum(1 << flag for flag in FLAGS.values())
    assert stand.told["flags"] == ["-TF32", "VERSION_COMPATIBLE"] and stand.told["cache"] == b"old timings"
    settings = stand.settings
    assert settings.hardware_compatibility_level == "AMPERE_PLUS" and settings.builder_optimization_level == 5
    assert cache.read_bytes() == b"new timings" and sorted(x.name for x in tmp_path.iterdir()) == ["out", "timings"]
    assert not stand.graph.functions
    plugins = [node.op_type for node in stand.graph.graph.node if node.domain == "gdn"]
    assert sorted(plugins) == ["causal_conv1d", "chunk_gated_delta_rule"]
    shapes = {(name, tuple(largest)) for name, _, _, largest in stand.told["shapes"]}
    assert shapes >= {("x", (4, 1, 96)), ("x", (1, 100, 96)), ("state", (4, 2, 16, 16))}
    engine = result.manifest["tensorrt"]
    assert engine["path"] == "tensorrt plugins" and engine["reason"] == "full TensorRT is installed"
    assert engine["plugins"] == {"gdn::causal_conv1d": 1, "gdn::chunk_gated_delta_rule": 1}
    assert (engine["hardware_compatible"], engine["version_compatible"]) == ("ampere_plus", True)
    assert result.report["proved"].endswith("in the engine, plugins are in the place of its functions")
    assert (engine["timing_cache"], engine["warnings"]) == ("timings", ["slow"])
    assert result.files["model.engine"].read_bytes() == b"plan"
    # The file that stays is the proved one, with the functions.
    assert onnx.load(str(result.files["model.onnx"])).functions and verify(result.out_dir) == result.manifest


def test_a_timing_cache_of_something_else_is_refused(build, tmp_path):
    cache = tmp_path / "timings"
    cache.write_bytes(b"of another GPU")
    with pytest.raises(ValueError, match="timing_cache: expected a cache of this TensorRT on this GPU, got"):
        build(Stand(), timing_cache=cache)
    assert cache.read_bytes() == b"of another GPU" and [x.name for x in tmp_path.iterdir()] == ["timings"]


def test_a_build_that_fails_keeps_the_cache_and_says_why(build, tmp_path):
    with pytest.raises(RuntimeError, match=r"tensorrt 11\.4\.0 built no engine: the tactic failed"):
        build(Stand(plan=None), timing_cache=tmp_path / "timings")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_engine_of_plugins_gives_eagers_numbers(tmp_path, dtype):
    trt = pytest.importorskip("tensorrt", reason="full TensorRT is not installed")
    model, inputs = modules.Mixer(dtype), modules.mixer_inputs(3, 70, dtype)
    result = build_tensorrt(
        model, tmp_path / "out", runtime="tensorrt", example_inputs=inputs, dynamic_shapes=modules.mixer_shapes(),
        profiles={"all": {"batch": (1, 2, 4), "length": (1, 64, 100)}},
    )  # fmt: skip
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(result.files["model.engine"].read_bytes())
    context, stream = engine.create_execution_context(), torch.cuda.current_stream().cuda_stream
    (program,) = result.manifest["programs"].values()
    for B, T in ((1, 1), (3, 33), (4, 100)):
        x, gates, state = modules.mixer_inputs(B, T, dtype, "cuda", seed=T)
        memory = {"x": x, "gates.g": gates["g"], "gates.beta": gates["beta"], "state": state}
        for name, value in memory.items():
            context.set_input_shape(name, tuple(value.shape))
        for described in program["outputs"]:
            shape = tuple(context.get_tensor_shape(described["name"]))
            memory[described["name"]] = torch.empty(shape, dtype=getattr(torch, described["dtype"]), device="cuda")
        for name, value in memory.items():
            context.set_tensor_address(name, value.data_ptr())
        assert context.execute_async_v3(stream)
        torch.cuda.synchronize()
        with torch.no_grad():
            eager = modules.Mixer(dtype).cuda()(x, gates, state)
        for name, output in zip(("y", "state", "conv"), program["outputs"]):
            assert parity.error(memory[output["name"]], eager[name]) <= parity.TOLERANCE[dtype], (name, B, T)
