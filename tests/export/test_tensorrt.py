"""``build_tensorrt`` with TensorRT-RTX: engines built without a GPU, what they say of themselves, and refusals."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import types

import pytest
import torch
from torch.export import Dim

from tests import oracle
from tests.export import modules, tensorrt_exports
from tests.export.tensorrt_exports import CAPABILITIES, DTYPES, MODELS
from tests.models.models import make, tokens

pytest.importorskip("onnx", minversion="1.23")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gdn-ops[tensorrt-rtx]'")

from gdn_ops.export import build_tensorrt, parity, read_manifest, tensorrt_engine, tensorrt_runtime, verify  # noqa: E402
from gdn_ops.export import tensorrt as public  # noqa: E402
from gdn_ops.export.onnx_session import Session  # noqa: E402
from gdn_ops.export.program import flatten_state  # noqa: E402

every_engine = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
every_model = pytest.mark.parametrize("name", MODELS)
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    return tensorrt_exports.Engines(tensorrt_exports.shared_folder(tmp_path_factory))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Doubled(torch.nn.Module):
    """A length of its own, and one that is twice as long."""

    def forward(self, x, y):
        return {"sum": x.repeat(1, 2) + y}


@every_model
@every_engine
def test_the_engine_has_the_models_inputs_outputs_and_states(name, dtype, engines):
    model, result, _ = engines(name, dtype)
    manifest, states = result.manifest, flatten_state(model.init_state(1))
    assert manifest == read_manifest(result.out_dir) == verify(result.out_dir)
    bindings = manifest["tensorrt"]["bindings"]
    inputs = {x["name"]: x for x in bindings if x["mode"] == "input"}
    outputs = {x["name"]: x for x in bindings if x["mode"] == "output"}
    assert list(inputs) == ["input_ids", *states]
    assert list(outputs) == ["logits", *(f"present.{x}" for x in states)]
    assert (inputs["input_ids"]["dtype"], inputs["input_ids"]["shape"]) == ("int64", [-1, -1])
    assert (outputs["logits"]["dtype"], outputs["logits"]["shape"][2]) == (short(dtype), model.config.vocab_size)
    for state, value in states.items():
        for binding in (inputs[state], outputs[f"present.{state}"]):
            assert binding["dtype"] == short(value.dtype), "a state changed its precision"
        assert inputs[state]["shape"] == [-1, *value.shape[1:]]
    recurrent = [x for x in inputs if x.endswith("recurrent")]
    assert recurrent and {inputs[x]["dtype"] for x in recurrent} == {"float32"}
    plan = result.files["model.engine"].read_bytes()
    assert all(x.encode() in plan for x in (*inputs, *outputs))
    (program,) = manifest["programs"].values()
    assert (program["file"], program["size"]) == ("model.engine", len(plan))
    assert program["states"] == {x: f"present.{x}" for x in states}


@every_model
@every_engine
def test_decode_and_prefill_are_two_profiles_of_one_engine(name, dtype, engines):
    model, result, _ = engines(name, dtype)
    decode, prefill = result.manifest["tensorrt"]["profiles"]
    assert (decode["name"], decode["index"], prefill["name"], prefill["index"]) == ("decode", 0, "prefill", 1)
    assert decode["sizes"] == {"batch": [1, 1, 8], "T": [1, 1, 1]}
    assert prefill["sizes"] == {"batch": [1, 1, 8], "T": [2, 512, 4096]}
    assert decode["inputs"]["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [8, 1]}
    assert prefill["inputs"]["input_ids"] == {"min": [1, 2], "opt": [1, 512], "max": [8, 4096]}
    for profile in (decode, prefill):
        for state, value in flatten_state(model.init_state(1)).items():
            rest = list(value.shape[1:])
            assert profile["inputs"][state] == {"min": [1, *rest], "opt": [1, *rest], "max": [8, *rest]}


@every_model
@every_engine
def test_the_layer_report_shows_the_loop_and_the_branch(name, dtype, engines):
    """Each rule and each convolution is there for one token and for any length; the rule is fp32 in any engine."""
    model, result, _ = engines(name, dtype)
    report = json.loads(result.files["layers.json"].read_text())
    assert report == result.layers
    layers, types = report["layers"], report["types"]
    assert sum(types.values()) == len(layers) > 1000 and all(layer["name"] for layer in layers)
    rules = model.config.layer_mixers.count("gdn")
    assert types["TRIP_LIMIT"] == types["RECURRENCE"] == 2 * rules
    assert types["ITERATOR"] == 8 * 2 * rules  # row numbers of keys and values, gates in four forms, beta in two
    # One branch for the whole model (T = 1), and in each of its two parts one for each rule and each convolution.
    assert types["CONDITION"] == 1 + 2 * 2 * rules
    carried = [out for layer in layers if layer["type"] == "RECURRENCE" for out in layer["outputs"]]
    assert {out["dtype"] for out in carried} == {"float32"}
    products = [out["dtype"] for layer in layers if layer["type"] == "MATRIX_MULTIPLY" for out in layer["outputs"]]
    assert set(products) == {"float32", short(dtype)} and products.count("float32") >= 16 * rules
    if not torch.cuda.is_available():
        assert not report["inspector"]["available"] and "no GPU" in report["inspector"]["reason"]


@every_model
@every_engine
@torch.no_grad()
def test_the_engines_onnx_file_gives_eagers_numbers(name, dtype, engines):
    """By ONNX Runtime, from the folder: prefill, then steps on the file's own states."""
    model, result, _ = engines(name, dtype)
    report = json.loads(result.files["parity.json"].read_text())
    assert report == result.report and report["passed"] and report["target"] == "tensorrt"
    assert report["proved"] == "the ONNX file of the engine" and len(report["cases"]) == 16
    session = Session(result.files["model.onnx"])
    eager_state = model.init_state(2)
    state = list(flatten_state(eager_state).values())
    for T in (70, 1, 1):
        ids = tokens(2, T, seed=T)
        logits, *state = session(ids, *state)
        eager, eager_state = model.prefill(ids, eager_state)
        errors = parity.compare([logits, *state], (eager, flatten_state(eager_state)), session.outputs)
        assert max(errors.values()) < parity.TOLERANCE[dtype], (T, errors)
    session.close()


@every_model
@every_engine
def test_the_manifest_says_which_way_was_taken_and_for_whom(name, dtype, engines):
    _, result, _ = engines(name, dtype)
    manifest, engine = result.manifest, result.manifest["tensorrt"]
    assert (manifest["format"], manifest["target"]) == ("gdn_ops.tensorrt", "tensorrt")
    assert (manifest["device"], manifest["dtype"]) == ("cuda", short(dtype))
    assert engine["path"] == "tensorrt-rtx portable" and engine["reason"] == "runtime='tensorrt-rtx' was asked for"
    assert engine["version"] == manifest["versions"]["tensorrt-rtx"] == trt.__version__
    assert engine["compute_capabilities"] == list(CAPABILITIES)
    assert engine["strongly_typed"] and not engine["tf32"] and not engine["executed"]
    assert sorted(result.files) == ["layers.json", "manifest.json", "model.engine", "model.onnx", "parity.json"]
    (program,) = manifest["programs"].values()
    assert [x["file"] for x in program["data"]] == ["model.onnx"]


def test_bfloat16_is_proved_by_its_twin(tmp_path, engines):
    """ONNX Runtime has no bfloat16 product on the CPU; the engine has."""
    model = make("G", BFLOAT16, num_hidden_layers=1, tie_word_embeddings=False)
    result = build_tensorrt(model, tmp_path / "out", runtime="tensorrt-rtx", compute_capabilities=("sm_89",))
    dtypes = {x["name"]: x["dtype"] for x in result.manifest["tensorrt"]["bindings"]}
    assert (dtypes["logits"], dtypes["layers.0.conv"], dtypes["layers.0.recurrent"]) == (
        "bfloat16", "bfloat16", "float32",
    )  # fmt: skip
    assert result.report["proved"].startswith("the float32 twin") and result.report["passed"]
    assert result.report["dtype"] == "float32" and result.report["max_error"] < 1e-5
    assert result.manifest["dtype"] == "bfloat16" and model.lm_head.weight.dtype == BFLOAT16
    with pytest.raises(RuntimeError, match=r"float32 twin differ at node \d+: "):
        public.compare_nodes(
            result.files["model.onnx"],
            engines("tiny", torch.float32)[1].files["model.onnx"],
        )


def test_a_module_with_profiles_of_its_own(tmp_path):
    result = build_tensorrt(
        modules.Mixer(), tmp_path / "out", example_inputs=modules.mixer_inputs(3, 70),
        dynamic_shapes=modules.mixer_shapes(), compute_capabilities=("sm_120",), optimization_level=1,
        profiles={"one": {"batch": 1, "length": [1, 1, 1]}, "many": {"batch": (1, 2, 4), "length": (1, 64, 100)}},
    )  # fmt: skip
    engine = result.manifest["tensorrt"]
    assert [x["name"] for x in engine["profiles"]] == ["one", "many"] and engine["optimization_level"] == 1
    assert engine["profiles"][0]["inputs"]["x"] == {"min": [1, 1, 96], "opt": [1, 1, 96], "max": [1, 1, 96]}
    assert engine["profiles"][1]["inputs"]["gates.g"] == {"min": [1, 1, 2], "opt": [2, 64, 2], "max": [4, 100, 2]}
    assert [x["name"] for x in engine["bindings"]] == [
        "x", "gates.g", "gates.beta", "state", "y", "present.state", "conv",
    ]  # fmt: skip
    assert engine["reason"].endswith("TensorRT-RTX takes no plugins, so the operators are in portable form")


def test_sizes_that_are_expressions_of_others(tmp_path):
    length = Dim("T", min=1, max=50)
    inputs = torch.ones(2, 5), torch.ones(2, 10)
    shapes = ({1: length}, {1: 2 * length})
    profiles = {"any": {"T": (1, 8, 20)}}
    result = build_tensorrt(
        Doubled(), tmp_path / "out", example_inputs=inputs, dynamic_shapes=shapes, profiles=profiles
    )
    assert result.manifest["tensorrt"]["profiles"][0]["inputs"]["y"] == {"min": [2, 2], "opt": [2, 16], "max": [2, 40]}
    with pytest.raises(ValueError, match=r"profiles\['any'\]\['T'\]: expected sizes from 1 to 50, got \(1, 8, 51\)"):
        build_tensorrt(
            Doubled(), tmp_path / "two", example_inputs=inputs, dynamic_shapes=shapes,
            profiles={"any": {"T": (1, 8, 51)}},
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_any_length_may_be_fixed_or_go_down_to_one(tmp_path):
    """The shapes of the branch for one token hold at any length, or the builder would refuse these."""
    for name, length in (("fixed", 64), ("from one", (1, 64, 100))):
        result = build_tensorrt(
            make("G", torch.float32, num_hidden_layers=1), tmp_path / "out", compute_capabilities=("sm_89",),
            runtime="tensorrt-rtx", profiles={name: {"batch": 2, "T": length}},
        )  # fmt: skip
        assert result.manifest["tensorrt"]["profiles"][0]["inputs"]["input_ids"]["opt"] == [2, 64]


def test_fixed_sizes_need_no_profiles(tmp_path):
    result = build_tensorrt(torch.nn.Linear(3, 2), tmp_path / "out", example_inputs=(torch.ones(4, 3),))
    (profile,) = result.manifest["tensorrt"]["profiles"]
    assert profile["inputs"] == {"input": {"min": [4, 3], "opt": [4, 3], "max": [4, 3]}}
    with pytest.raises(TypeError, match="profiles: expected a dict of profiles by name, got None"):
        build_tensorrt(
            torch.nn.Linear(3, 2), tmp_path / "two", example_inputs=(torch.ones(4, 3),),
            dynamic_shapes=({0: Dim("batch", min=1)},),
        )  # fmt: skip


def test_large_weights_lie_beside_the_onnx_file(tmp_path, monkeypatch):
    monkeypatch.setattr("gdn_ops.export.onnx.LARGE", 1000)
    result = build_tensorrt(torch.nn.Linear(64, 64), tmp_path / "out", example_inputs=(torch.ones(4, 64),))
    (program,) = result.manifest["programs"].values()
    assert [x["file"] for x in program["data"]] == ["model.onnx", "model.onnx.data"]
    assert result.files["model.engine"].stat().st_size > result.files["model.onnx.data"].stat().st_size >= 4 * 64 * 64
    with open(result.files["model.onnx.data"], "r+b") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"model\.onnx\.data: expected sha256"):
        verify(result.out_dir)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "profiles: expected a dict of profiles by name, got []"),
        ({}, "profiles: expected a dict of profiles by name, got {}"),
        ({"a": 1}, "profiles['a']: expected a dict of sizes by name, got 1"),
        ({"a": {"T": 1}}, "profiles['a']: expected the sizes batch, T, got T"),
        ({"a": {"T": 1, "batch": 1, "N": 1}}, "profiles['a']: expected the sizes batch, T, got T, batch, N"),
        ({"a": {"T": "1", "batch": 1}}, "profiles['a']['T']: expected an integer or (min, opt, max), got '1'"),
        ({"a": {"T": (1, 2), "batch": 1}}, "profiles['a']['T']: expected an integer or (min, opt, max), got (1, 2)"),
        ({"a": {"T": (3, 2, 4), "batch": 1}}, "profiles['a']['T']: expected min <= opt <= max, got (3, 2, 4)"),
        ({"a": {"T": (0, 2, 4), "batch": 1}}, "profiles['a']['T']: expected sizes from 1, got (0, 2, 4)"),
    ],
)
def test_profiles_that_are_none(given, told):
    dynamic = {"batch": {"min": 1, "max": None}, "T": {"min": 1, "max": None}}
    with pytest.raises((ValueError, TypeError)) as refusal:
        tensorrt_engine.check_profiles(given, dynamic)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"runtime": "trt"}, "runtime: expected one of tensorrt, tensorrt-rtx or None, got 'trt'"),
        ({"timing_cache": "cache"}, "timing_cache: TensorRT-RTX {v} has no such thing; it times nothing"),
        ({"version_compatible": True}, "version_compatible: TensorRT-RTX {v} has no such thing; an engine is read by"),
        ({"hardware_compatible": "ampere_plus"}, "hardware_compatible: TensorRT-RTX {v} has no such thing; the GPUs"),
        ({"hardware_compatible": "all"}, "hardware_compatible: expected one of ampere_plus, same_compute_capability"),
        ({"optimization_level": 6}, "optimization_level: expected an integer from 0 to 5, got 6"),
        ({"compute_capabilities": ("sm_90",)}, "sm_89; Hopper needs full TensorRT; got 'sm_90'"),
        ({"compute_capabilities": ("sm_75",)}, "because it has no float32 product below sm_80; got 'sm_75'"),
        ({"compute_capabilities": ("ada",)}, "compute_capabilities: TensorRT-RTX {v} builds for sm_"),
        ({"compute_capabilities": ()}, "compute_capabilities: expected some of sm_"),
    ],
)
def test_options_that_are_refused(tmp_path, options, told):
    runtime = {"runtime": "tensorrt-rtx", **options}
    with pytest.raises(ValueError) as refusal:
        build_tensorrt(make("G", torch.float32), tmp_path / "out", **runtime)
    assert told.replace("{v}", trt.__version__) in str(refusal.value) and not list(tmp_path.iterdir())


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"float64 has no form in target 'tensorrt'.*model\.float\(\)"):
        build_tensorrt(make("G", torch.float64), tmp_path / "out")
    with pytest.raises(ValueError, match="model: expected it on cpu, where its ONNX file is proved, got meta"):
        build_tensorrt(make("G", torch.float32, "meta"), tmp_path / "out")
    packed = {"example_inputs": modules.packed_inputs([0, 9, 40]), "dynamic_shapes": modules.packed_shapes()}
    with pytest.raises(ValueError, match="cu_seqlens: packed sequences have no form in ONNX"):
        build_tensorrt(modules.Packed(), tmp_path / "out", profiles={"a": {}}, **packed)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="out_dir: expected a new or empty folder or a previous export"):
        build_tensorrt(make("G", torch.float32), tmp_path)


@contextlib.contextmanager
def installed(monkeypatch, **packages):
    """Inside, each package of TensorRT is what is given: None for absent, an exception, or a version."""
    importing = tensorrt_runtime.importlib.import_module

    def find(name):
        if name not in packages:
            return importing(name)
        package = packages[name]
        if package is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(package, Exception):
            raise package
        return types.SimpleNamespace(__version__=package)

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_runtime.importlib, "import_module", find)
        yield


def test_a_missing_or_unsuitable_installation_is_named(monkeypatch):
    find = tensorrt_runtime.find
    with installed(monkeypatch, tensorrt=None, tensorrt_rtx=None):
        with pytest.raises(ModuleNotFoundError, match=r"needs tensorrt_rtx or tensorrt.*'gdn-ops\[tensorrt-rtx\]'"):
            find(None)
        with pytest.raises(ModuleNotFoundError, match=r"needs tensorrt_rtx: pip install 'gdn-ops\[tensorrt-rtx\]'"):
            find("tensorrt-rtx")
        with pytest.raises(ModuleNotFoundError, match=r"needs tensorrt: install TensorRT from NVIDIA"):
            find("tensorrt")
    absent = ImportError("libnvinfer.so.11: cannot open shared object file")
    with installed(monkeypatch, tensorrt=absent), pytest.raises(RuntimeError, match=r"does not load: libnvinfer\.so"):
        find("tensorrt")
    with (
        installed(monkeypatch, tensorrt_rtx=absent),
        pytest.raises(RuntimeError, match=rf"tensorrt-rtx {trt.__version__}.*does not load.*gdn-ops\[tensorrt-rtx"),
    ):
        find("tensorrt-rtx")
    dependency = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    with installed(monkeypatch, tensorrt=dependency), pytest.raises(RuntimeError, match="does not load: No module nam"):
        find("tensorrt")
    with (
        installed(monkeypatch, tensorrt="10.8.0.43"),
        pytest.raises(ValueError, match=r"expected tensorrt 10\.9 or later, got 10\.8\.0\.43"),
    ):
        find("tensorrt")
    with (
        installed(monkeypatch, tensorrt="10.14.1"),
        pytest.raises(ValueError, match=r"whose Python plugins work, got 10\.14\.1"),
    ):
        find("tensorrt")
    with (
        installed(monkeypatch, tensorrt_rtx="1.0.0"),
        pytest.raises(ValueError, match=r"expected tensorrt-rtx 1\.7 or later, got 1\.0\.0"),
    ):
        find("tensorrt-rtx")


def test_the_full_one_is_taken_where_it_can_build(monkeypatch):
    with installed(monkeypatch, tensorrt="11.4.0.106"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match=r"tensorrt 11\.4\.0\.106 builds on the GPU.*runtime='tensorrt-rtx'"):
            tensorrt_runtime.find("tensorrt")
        found = tensorrt_runtime.find(None)
        assert found.name == "tensorrt-rtx" and "builds on the GPU that will run the engine" in found.reason
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = tensorrt_runtime.find(None)
        assert (found.name, found.plugins) == ("tensorrt", True) and "become plugins" in found.reason
        with pytest.raises(
            ValueError, match=r"compute_capabilities: TensorRT 11\.4\.0\.106 builds for the GPU that it"
        ):
            tensorrt_runtime.check_options(found, tensorrt_runtime.Options(compute_capabilities=("sm_89",)))


def test_the_gpu_at_hand_is_named(monkeypatch):
    runtime = tensorrt_runtime.find("tensorrt-rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tensorrt_runtime.this_gpu(runtime, ["sm_89"]) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    said = {}
    for capability in ((8, 9), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # noqa: B023
        said[capability] = tensorrt_runtime.this_gpu(runtime, ["sm_89"])
    assert said == {
        (8, 9): "a GPU (sm_89): the engine is for it", (8, 0): "a GPU (sm_80): the engine is for others",
        (9, 0): "a GPU (sm_90): TensorRT-RTX does not run on it; use full TensorRT",
    }  # fmt: skip
    full = runtime._replace(name="tensorrt")
    assert tensorrt_runtime.this_gpu(full, None) == "a GPU (sm_90): the engine is for it"


def test_nothing_of_tensorrt_is_imported_before_it_is_used():
    code = "import sys, gdn_ops.export, gdn_ops.cli.app; print([x for x in sys.modules if x.startswith('tensorrt')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


@every_model
def test_phases_are_told_as_they_come(name, engines):
    _, _, told = engines(name, torch.float32)
    phases = {phase for phase, _, _ in told}
    assert {"Building engine", "Optimizing graph"} <= phases
    whole = [(done, steps) for phase, done, steps in told if phase == "Building engine"]
    assert whole[0] == (0, whole[0][1]) and whole[-1][0] == whole[-1][1] > 1
    assert all(0 <= done <= steps for _, done, steps in told)


def test_what_progress_raises_stops_the_build(tmp_path):
    """And an interrupted build leaves the earlier export as it was."""
    linear, inputs = torch.nn.Linear(3, 2), (torch.ones(4, 3),)
    earlier = build_tensorrt(linear, tmp_path / "out", example_inputs=inputs)

    def stop(phase, done, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(linear, tmp_path / "out", example_inputs=inputs, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(tmp_path / "out") == earlier.manifest


def test_a_builder_that_gives_no_engine_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_runtime, "TOO_OLD", ())
    with pytest.raises(RuntimeError, match=r"tensorrt-rtx .* built no engine: .*FP32 GEMM is not supported"):
        build_tensorrt(
            torch.nn.Linear(3, 2), tmp_path / "out", example_inputs=(torch.ones(4, 3),), runtime="tensorrt-rtx",
            compute_capabilities=("sm_75",),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_parser_cannot_read(tmp_path):
    path, runtime = tmp_path / "model.onnx", tensorrt_runtime.find("tensorrt-rtx")
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"model: the ONNX parser of tensorrt-rtx .* cannot read the file: .+"):
        tensorrt_engine.build_engine(runtime, path, {}, {}, tensorrt_runtime.Options(), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_network_that_is_not_the_manifests_is_refused():
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    network.mark_output(network.add_identity(network.add_input("x", trt.float32, (-1, 3))).get_output(0))
    network.get_output(0).name = "y"

    def entry(**changes):
        x = {"name": "x", "dtype": "float32", "shape": ["batch", 3], **changes}
        return {"inputs": [x], "outputs": [{**x, "name": "y"}]}

    assert [x["name"] for x in tensorrt_engine.check_bindings(trt, network, entry())] == ["x", "y"]
    for changes in ({"name": "z"}, {"dtype": "float16"}, {"shape": ["batch", 4]}, {"shape": ["batch"]}):
        with pytest.raises(RuntimeError, match="network: expected the input"):
            tensorrt_engine.check_bindings(trt, network, entry(**changes))
    with pytest.raises(RuntimeError, match="network: expected 3 inputs and outputs, got 2"):
        more = entry()
        tensorrt_engine.check_bindings(trt, network, {**more, "outputs": more["outputs"] * 2})


@every_model
def test_the_program_of_the_docstring_fits_the_bindings(name, tmp_path, monkeypatch, engines):
    """No GPU here runs the engine, so the runtime is a stand-in that holds shapes and sizes against the manifest."""
    model, result, _ = engines(name, torch.float16)
    shapes, addresses, profiles = {}, {}, []
    context = types.SimpleNamespace(
        set_optimization_profile_async=lambda index, stream: profiles.append(index),
        set_input_shape=lambda name, shape: shapes.update({name: list(shape)}),
        set_tensor_address=lambda name, address: addresses.update({name: address}),
        execute_async_v3=lambda stream: profiles.append("run"),
    )
    engine = types.SimpleNamespace(create_execution_context=lambda: context)

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            assert plan == result.files["model.engine"].read_bytes()
            return engine

    stand_in = types.SimpleNamespace(Runtime=Runtime, Logger=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda shape, value, dtype, device: full(shape, value, dtype=dtype))
    (tmp_path / "out").symlink_to(result.out_dir)
    monkeypatch.chdir(tmp_path)
    code, scope = public.__doc__.split("12.x::")[1].split("An export is")[0], {}
    exec("\n".join(line[4:] for line in code.splitlines()), scope)
    states = flatten_state(model.init_state(1))
    assert profiles == [1, "run"] and shapes == {"input_ids": [1, 70]} | {x: list(s.shape) for x, s in states.items()}
    assert list(addresses) == [x["name"] for x in result.manifest["tensorrt"]["bindings"]]
    assert scope["logits"].shape == (1, 70, model.config.vocab_size) and scope["logits"].dtype == torch.float16
    for state, value in states.items():
        assert oracle.error(scope["memory"][state].float(), value.float()) == 0.0
        assert scope["memory"][f"present.{state}"].dtype == value.dtype
