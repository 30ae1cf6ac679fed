"""``export_onnx``: three dialects that give eager's numbers, files that are what they say, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.export import Dim

import gdn_ops
from tests import oracle
from tests.export import modules, onnx_exports
from tests.export.onnx_exports import TARGETS, needs_the_operators
from tests.models.models import make, tokens

onnx = pytest.importorskip("onnx", minversion="1.23")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gdn_ops.export import ParityError, export_onnx, onnx_proof, parity, read_manifest, verify  # noqa: E402
from gdn_ops.export.onnx_layers import kinds  # noqa: E402
from gdn_ops.export.onnx_session import Session  # noqa: E402
from gdn_ops.export.program import flatten_state, plan  # noqa: E402

DOMAINS = {
    "portable": {"ai.onnx": 18, "gdn_ops": 1},
    "ort": {"ai.onnx": 18, "gdn_ops": 1, "com.microsoft": 1},
    "onnx27": {"ai.onnx": 27},
}
OPERATORS = {
    "portable": ("bodies", {"gdn_ops::GatedDeltaRule", "gdn_ops::CausalConv1d"}),
    "ort": ("kernels", {"com.microsoft::LinearAttention", "com.microsoft::CausalConvWithState"}),
    "onnx27": ("bodies", {"ai.onnx::LinearAttention", "ai.onnx::CausalConvWithState"}),
}
CASES = ("T=1", "T=C-1", "T=C", "T=C+1", "ragged")
ONE_NODE = {"portable": "GatedDeltaRule", "ort": "LinearAttention", "onnx27": "LinearAttention"}


def program_of(result) -> dict:
    (program,) = result.manifest["programs"].values()
    return program


def weight_bytes(tensor) -> int:
    return onnx.numpy_helper.to_array(tensor).nbytes


class Rule(torch.nn.Module):
    """The operator alone, with whatever its caller leaves out."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, g, beta):
        o, state = gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta, **self.options)
        return o if state is None else (o, state)


def rule_inputs(B, T, H, HV, K, V, dtype=torch.float32, seed=0):
    inputs = oracle.make_inputs(B, T, H, HV, K, V, dtype, seed=seed)
    return tuple(inputs[name] for name in ("q", "k", "v", "g", "beta"))


def rule_shapes():
    return tuple({0: Dim("batch", min=1), 1: Dim("T", min=1)} for _ in range(5))


@pytest.mark.parametrize("target", TARGETS)
def test_the_users_own_module_gives_eagers_numbers_at_other_sizes(target):
    """By ONNX Runtime alone, fed by name; the export's own parity is not asked."""
    model, result = onnx_exports.mixer(target)
    session = onnxruntime.InferenceSession(str(result.files["model.onnx"]), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["x", "gates.g", "gates.beta", "state"]
    assert [x.name for x in session.get_outputs()] == ["y", "present.state", "conv"]
    for B, T in ((1, 1), (2, 31), (1, 32), (4, 33), (2, 100)):
        x, gates, state = modules.mixer_inputs(B, T, seed=T)
        feeds = {"x": x, "gates.g": gates["g"], "gates.beta": gates["beta"], "state": state}
        got = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        with torch.no_grad():
            eager = model(x, gates, state)
        for value, name in zip(got, ("y", "state", "conv")):
            oracle.assert_close(torch.from_numpy(value), eager[name], 1e-5, f"{name} at {B}x{T}")


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_one_graph_prefills_and_decodes(target):
    """Prefill, then prefill again, then steps, each from the states that the file itself put out."""
    model, result = onnx_exports.language_model(target)
    program, session = program_of(result), Session(result.files["model.onnx"])
    names = list(program["states"])
    assert names == list(flatten_state(model.init_state(1)))
    assert session.inputs == ["input_ids", *names]
    assert session.outputs == ["logits", *(f"present.{name}" for name in names)] == [
        "logits", *program["states"].values(),
    ]  # fmt: skip
    for B in (1, 3):
        eager_state, state = model.init_state(B), list(flatten_state(model.init_state(B)).values())
        for T in (33, 1, 1, 70, 1):
            ids = tokens(B, T, seed=T)
            logits, *state = session(ids, *state)
            eager, eager_state = model.prefill(ids, eager_state)
            errors = parity.compare([logits, *state], (eager, flatten_state(eager_state)), session.outputs)
            assert max(errors.values()) < 1e-5, (B, T, errors)
    session.close()


@pytest.mark.parametrize("target", TARGETS)
def test_greedy_text_is_eagers(target):
    model, result = onnx_exports.language_model(target)
    session, prompt = Session(result.files["model.onnx"]), tokens(1, 40)
    state, ids, written = list(flatten_state(model.init_state(1)).values()), prompt, []
    for _ in range(20):
        logits, *state = session(ids, *state)
        ids = logits[:, -1:].argmax(-1)
        written.append(int(ids))
    session.close()
    assert written == model.generate(prompt, max_new_tokens=20)[0, 40:].tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_what_the_manifest_says(target):
    """Stamps, names, digests, modes; every operator a node of its own in each branch, and who computed it; no weight
    twice."""
    eager, result = onnx_exports.language_model(target)
    program = program_of(result)
    model = onnx.load(str(result.files["model.onnx"]))
    onnx.checker.check_model(model, full_check=True)
    assert {x.domain or "ai.onnx": x.version for x in model.opset_import} == DOMAINS[target] == program["opsets"]
    assert {x.version for f in model.functions for x in f.opset_import if x.domain == ""} <= {18}
    kind, operators = OPERATORS[target]
    assert program["nodes"] == {"kernels": {}, "bodies": {}} | {kind: dict.fromkeys(sorted(operators), 2)}
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    for graph in branches.values():
        assert [node.op_type for node in graph.node].count(ONE_NODE[target]) == 1 and not graph.initializer
    for described, values in ((program["inputs"], model.graph.input), (program["outputs"], model.graph.output)):
        shapes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in values]
        assert [(x["name"], x["shape"]) for x in described] == list(zip((x.name for x in values), shapes))
    assert 0.98 < sum(map(weight_bytes, model.graph.initializer)) / (4 * eager.num_parameters()) < 1.02
    assert program["dynamic"] == {"batch": {"min": 1, "max": None}, "T": {"min": 1, "max": None}}
    manifest = read_manifest(result.out_dir)
    assert manifest == result.manifest == verify(result.out_dir)
    assert (manifest["format"], manifest["target"], manifest["dtype"]) == ("gdn_ops.onnx", target, "float32")
    assert manifest["versions"].keys() >= {"gdn_ops", "torch", "onnx", "onnxruntime", "onnxscript"}
    assert sorted(result.files) == ["manifest.json", "model.onnx", "parity.json"]
    assert {oct(path.stat().st_mode & 0o777) for path in result.files.values()} == {"0o644"}
    assert result.out_dir.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("target", TARGETS)
def test_the_parity_report_has_every_case(target):
    _, result = onnx_exports.language_model(target)
    report = json.loads(result.files["parity.json"].read_text())
    assert report == result.report and report["passed"] and report["target"] == target
    cases = [(case["program"], case["case"]) for case in report["cases"]]
    assert cases[:10] == [("prefill", case + more) for case in CASES for more in ("", ", continued")]
    assert cases[10:] == [("step", "prefill then decode")] * 6
    for program in ("prefill", "step"):
        assert {case["sizes"]["batch"] for case in report["cases"] if case["program"] == program} == {1, 3}
    assert 0 < report["max_error"] < 1e-5
    evaluated = report["reference_evaluator"]
    assert [case["sizes"]["T"] for case in evaluated["cases"]] == [1, 5, 33]
    assert evaluated["passed"] and evaluated["max_error"] < 1e-5


def test_a_large_model_has_each_length_once(monkeypatch):
    """From an empty and from a used state, one row and several, then steps from two of them."""
    plans, cases = plan(make("GS", torch.float32)), {}
    for large in (False, True):
        monkeypatch.setattr(parity, "LARGE", 0 if large else 2**27)
        report = parity.Report(torch.float32)
        parity.language_model(report, plans, {name: item.module for name, item in plans.items()})
        report.check()
        cases[large] = [(case["case"], *case["sizes"].values()) for case in report.cases]
    assert len(cases[False]) == 16
    assert cases[True] == [
        ("T=1", 3, 1), ("T=C-1, continued", 1, 63), ("T=C, continued", 1, 64), ("T=C+1", 1, 65),
        ("ragged, continued", 1, 137), *(("prefill then decode", *sizes) for sizes in (
            (3, 1, 1), (3, 1, 2), (3, 1, 3), (1, 65, 1), (1, 65, 2), (1, 65, 3),
        )),
    ]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_keeps_the_rule_and_its_states_wide(target):
    model, result = onnx_exports.mixer(target, torch.float16)
    inputs = modules.mixer_inputs(2, 50, torch.float16, seed=4)
    session = Session(result.files["model.onnx"])
    y, state, conv = session(inputs[0], *inputs[1].values(), inputs[2])
    session.close()
    assert (y.dtype, state.dtype, conv.dtype) == (torch.float16, torch.float32, torch.float16)
    wide = modules.Mixer(torch.float16).double()
    with torch.no_grad():
        expected = wide(inputs[0].double(), {n: x.double() for n, x in inputs[1].items()}, inputs[2].double())
        eager = model(*inputs)
    for value, name in ((y, "y"), (state, "state")):
        bound = max(2 * oracle.error(eager[name], expected[name]), 1e-4)
        oracle.assert_close(value, expected[name], bound, f"{name}, against fp64")
    assert torch.equal(conv, eager["conv"])
    if target == "ort":
        assert result.report["nodes"]["kernels"]["com.microsoft::GatedDeltaNet"] == 1


@needs_the_operators
def test_a_runtime_without_the_fused_kernels_runs_the_bodies():
    """Renamed, the functions of an ``ort`` file are nobody's kernels; the numbers stay."""
    _, result = onnx_exports.mixer("ort")
    model = onnx.load(str(result.files["model.onnx"]))
    for group in ([model.graph.node], [f.node for f in model.functions]):
        for nodes in group:
            for node in nodes:
                node.domain = node.domain.replace("com.microsoft", "nobody")
    for function in model.functions:
        function.domain = function.domain.replace("com.microsoft", "nobody")
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        for item in imports:
            item.domain = item.domain.replace("com.microsoft", "nobody")
    inputs = modules.mixer_inputs(2, 45)
    x, gates, state = inputs
    feeds = {"x": x, "gates.g": gates["g"], "gates.beta": gates["beta"], "state": state}
    feeds = {name: value.numpy() for name, value in feeds.items()}
    providers = ["CPUExecutionProvider"]
    fused = onnxruntime.InferenceSession(str(result.files["model.onnx"]), providers=providers).run(None, feeds)
    bodies = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers).run(None, feeds)
    for a, b in zip(fused, bodies):
        assert oracle.error(torch.from_numpy(b), torch.from_numpy(a)) < 1e-6
    assert not all(np.array_equal(a, b) for a, b in zip(fused, bodies)), "the same kernels ran twice"


@pytest.mark.parametrize("target", TARGETS)
def test_no_state_grouped_heads_and_a_scale(target, tmp_path):
    model, inputs = Rule(scale=0.3), rule_inputs(2, 70, 2, 6, 16, 8)
    result = export_onnx(model, tmp_path / "out", target, inputs, rule_shapes())
    session = Session(result.files["model.onnx"])
    for B, T in ((1, 1), (3, 64), (2, 130)):
        inputs = rule_inputs(B, T, 2, 6, 16, 8, seed=T)
        (o,) = session(*inputs)
        expected = oracle.expected(dict(zip(("q", "k", "v", "g", "beta"), inputs), cu_seqlens=None), scale=0.3)["o"]
        oracle.assert_close(o, expected, oracle.TOLERANCE[torch.float32].values, f"o at {B}x{T}")
    session.close()


class Wide(torch.nn.Module):
    """Values that come to the rules from a wider type and are results too."""

    def forward(self, q, k, v, g, beta, state):
        beta, state = beta.double(), state.double().float()
        o, after = gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        linear, _ = gdn_ops.chunk_gated_linear_attention(q, k, v, g.double(), initial_state=after.double())
        return o, linear, after, beta, state


@pytest.mark.parametrize("target", TARGETS)
def test_what_comes_to_a_rule_through_float64(target, tmp_path):
    """ONNX Runtime removes a cast up and back again, and forgets the branches that read its result."""
    inputs, shapes = (
        (*rule_inputs(2, 70, 2, 2, 8, 8), torch.randn(2, 2, 8, 8)),
        (*rule_shapes(), {0: Dim("batch", min=1)}),
    )
    result = export_onnx(Wide(), tmp_path / "out", target, inputs, shapes)
    session = Session(result.files["model.onnx"])
    for B, T in ((1, 1), (3, 64)):
        inputs = *rule_inputs(B, T, 2, 2, 8, 8, seed=T), torch.randn(B, 2, 8, 8)
        errors = parity.compare(session(*inputs), Wide()(*inputs), session.outputs)
        assert list(errors) == ["0", "1", "2", "3", "4"] and max(errors.values()) < 1e-5, (B, T, errors)
    session.close()
    model = onnx.load(str(result.files["model.onnx"]))
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    up = [node.input[0] for node in casts if node.attribute[0].i == onnx.TensorProto.DOUBLE]
    assert up == ["beta", "state"], "those that are results"


@pytest.mark.parametrize("target", TARGETS)
def test_none_among_the_results_is_left_out(target, tmp_path):
    """As it is in a package, wherever it stands; also beside an argument that is a result."""

    class Some(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return None, gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta), {"beta": beta, "none": None}

    inputs = rule_inputs(2, 70, 2, 2, 8, 8)
    result = export_onnx(Some(), tmp_path / "out", target, inputs, rule_shapes())
    assert [x["name"] for x in program_of(result)["outputs"]] == ["1.0", "2.beta"]
    assert result.report["passed"] and result.report["cases"][0]["worst"] == "1.0"
    session = Session(result.files["model.onnx"])
    inputs = rule_inputs(1, 33, 2, 2, 8, 8, seed=1)
    errors = parity.compare(session(*inputs), Some()(*inputs), session.outputs)
    assert list(errors) == ["1.0", "2.beta"] and max(errors.values()) < 1e-5, errors
    session.close()


def test_a_result_after_none_counts():
    eager = (None, torch.ones(3), 4, torch.zeros(2))
    assert parity.compare((torch.ones(3), 4, torch.zeros(2)), eager, ["1", "3"]) == {"1": 0.0, "3": 0.0}
    assert parity.compare((None, torch.ones(3), 4, torch.ones(2)), eager, ["1", "3"])["3"] > 1
    assert parity.compare((torch.ones(3), 4), eager, ["1", "3"]) == {"number of results": float("inf")}


def test_a_state_that_is_an_input_an_output_and_unused(tmp_path):
    """Results that are an argument, twice the same, and a constant all get names of their own."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(3.0))

        def forward(self, state, unused):
            twice = state * 2
            return {"state": state, "a": twice, "b": twice, "weight": self.weight}

    result = export_onnx(Odd(), tmp_path / "out", "portable", (torch.ones(2, 3), torch.ones(1)))
    names = [x["name"] for x in program_of(result)["outputs"]]
    assert names == ["present.state", "a", "b", "present.weight"]
    session = Session(result.files["model.onnx"])
    values = session(torch.full((2, 3), 5.0), torch.ones(1))
    session.close()
    assert session.inputs == ["state", "unused"] and session.outputs == names
    for value, expected in zip(values, (torch.full((2, 3), 5.0), *[torch.full((2, 3), 10.0)] * 2, torch.arange(3.0))):
        assert torch.equal(value, expected)


def test_a_layer_of_another_kind_is_traced_itself(tmp_path):
    """Layers share their nodes only where nothing but the values of their weights differs."""
    model = make("GSGS", torch.float32, num_hidden_layers=4)
    assert kinds(model.layers) == [0, 1, 0, 1]
    model.layers[3].mixer.rope_theta = 500.0
    model.layers[2].mixer.o_proj = torch.nn.Linear(*reversed(model.layers[2].mixer.o_proj.weight.shape), bias=True)
    assert kinds(model.layers) == [0, 1, 2, 3]
    model.layers[2].mixer.o_proj.weight = model.layers[0].mixer.o_proj.weight
    result = export_onnx(model, tmp_path / "out", "portable")
    assert result.report["nodes"]["bodies"] == {"gdn_ops::CausalConv1d": 4, "gdn_ops::GatedDeltaRule": 4}
    assert all(module.training for module in model.modules()), "the model is not as it was"


def test_layers_that_share_weights_keep_their_own(tmp_path):
    """What two layers of different kinds share has one name in the trace; a third, like one of them, has its own."""
    model = make("GSGS", torch.float32, num_hidden_layers=4)
    model.layers[1].mlp = model.layers[0].mlp
    assert kinds(model.layers) == [0, 1, 2, 3]
    assert export_onnx(model, tmp_path / "out", "portable").report["passed"]
    model.layers[2] = model.layers[0]
    assert kinds(model.layers) == [0, 1, 0, 3]


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("gdn_ops.export.onnx.LARGE", 1000)
    model = make("G", torch.float32)
    result = export_onnx(model, tmp_path / "out", "ort")
    assert sorted(result.files) == ["manifest.json", "model.onnx", "model.onnx.data", "parity.json"]
    (data,) = program_of(result)["data"]
    assert data["size"] == result.files["model.onnx.data"].stat().st_size > 4 * model.num_parameters() * 0.9
    assert result.files["model.onnx.data"].stat().st_mode & 0o777 == 0o644
    verify(result.out_dir)
    moved = tmp_path / "moved"
    os.rename(result.out_dir, moved)
    Session(moved / "model.onnx").close()
    with open(moved / "model.onnx.data", "r+b") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"model\.onnx\.data: expected sha256"):
        verify(moved)


def test_wrong_numbers_are_no_export(tmp_path, monkeypatch):
    """A file that differs from eager raises, leaves the earlier export as it was, and leaves nothing else behind."""
    earlier = export_onnx(torch.nn.Linear(3, 2), tmp_path / "out", "portable", (torch.ones(1, 3),))
    digest = program_of(earlier)["sha256"]
    monkeypatch.setattr(onnx_proof, "_as_module", lambda run: lambda *args: [x * 1.1 for x in run(*args)])
    with pytest.raises(ParityError, match="forward example"):
        export_onnx(torch.nn.Linear(3, 2), tmp_path / "out", "portable", (torch.ones(1, 3),))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert program_of(earlier) == read_manifest(tmp_path / "out")["programs"]["forward"]
    assert verify(tmp_path / "out")["programs"]["forward"]["sha256"] == digest


def test_refusals_name_what_to_do(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"target: expected one of portable, ort, onnx27, got 'onnx'"):
        export_onnx(Rule(), out, "onnx")
    inputs = modules.packed_inputs([0, 9, 9, 40])
    with pytest.raises(ValueError, match="cu_seqlens: packed sequences have no form in ONNX"):
        export_onnx(modules.Packed(), out, "portable", inputs, modules.packed_shapes())
    with pytest.raises(ValueError, match="model: expected tensors as results, got 3 for rows"):
        export_onnx(modules.Constants(), out, "portable", (torch.ones(3, 2),))
    pool = torch.rand(1, 1, 2, 4), -torch.rand(1, 1, 2), torch.rand(3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"recurrent_gated_delta_rule_: it writes into its argument"):
        export_onnx(modules.InPlace(), out, "ort", pool)
    with pytest.raises(ValueError, match=r"bfloat16 cannot be proved in target 'ort'.*model\.float\(\)"):
        export_onnx(make("G", torch.bfloat16), out, "ort")
    with pytest.raises(ValueError, match=r"float64 has no form in target 'portable'.*export_aoti"):
        export_onnx(make("G", torch.float64), out, "portable")
    for target in ("ort", "onnx27"):
        with pytest.raises(ValueError, match="scale: expected another number than 0"):
            export_onnx(Rule(scale=0.0), out, target, rule_inputs(1, 5, 1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"example_inputs: expected a tuple.*got None"):
        export_onnx(Rule(), out)
    with pytest.raises(ValueError, match="model: expected it on cpu, where the file is proved, got meta"):
        export_onnx(make("G", torch.float32, "meta"), out)
    assert not out.exists() and not list(tmp_path.iterdir())
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="out_dir: expected a new or empty folder or a previous export"):
        export_onnx(make("G", torch.float32), tmp_path)


def test_a_missing_package_names_the_extra():
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "import torch; from gdn_ops.export import export_onnx\n"
        "try:\n    export_onnx(torch.nn.Linear(1, 1), 'out', example_inputs=(torch.ones(1, 1),))\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'gdn-ops[onnx]'" in done.stdout, done.stderr


def test_the_program_of_the_docstring_runs(tmp_path, monkeypatch):
    from gdn_ops.export import onnx as module

    model, result = onnx_exports.language_model("portable")
    code = module.__doc__.split("runs it::")[1].split("An export is")[0]
    scope: dict = {}
    (tmp_path / "out").symlink_to(result.out_dir)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in code.splitlines()), scope)
    with torch.no_grad():
        logits, state = model.prefill(torch.zeros(2, 70, dtype=torch.long), model.init_state(2))
    oracle.assert_close(torch.from_numpy(scope["logits"]), logits, 1e-5, "logits")
    for name, value in flatten_state(state).items():
        assert oracle.error(torch.from_numpy(scope["state"][name]), value) < 1e-5, name


def test_inputs_carry_their_own_names(tmp_path):
    """Fed by name, whatever the order of the example was."""
    inputs = modules.rule_inputs(2, 70)
    example = {name: inputs[name] for name in ("v", "k", "q", "beta", "g")}
    result = export_onnx(modules.Rule(), tmp_path / "out", example_inputs=example)
    session = onnxruntime.InferenceSession(str(result.files["model.onnx"]))
    (got,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    assert parity.error(torch.from_numpy(got), modules.Rule()(**inputs)) < 1e-5


def test_what_writes_in_place_is_refused(tmp_path):
    """A file of pure functions would lose it; a caller's tensors and buffers stay as they were."""
    model, x, state = modules.Counting(), torch.rand(6, 3), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="expected a forward that writes nothing in place, got one that writes the buffer"
    ):
        export_onnx(model, tmp_path / "out", example_inputs=(x, state))
    assert not (tmp_path / "out").exists() and not state.any() and not model.calls.any()


def test_no_result_is_refused(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="model: expected tensors as results, got none"):
        export_onnx(Nothing(), tmp_path / "out", example_inputs=(torch.ones(3),))
