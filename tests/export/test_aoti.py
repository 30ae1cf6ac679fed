"""``export_aoti``: packages that run alone, at sizes not seen at export, and what is written beside them."""

from __future__ import annotations

import errno
import hashlib
import json

import pytest
import torch
from gdn_ops.export import ParityError, aoti, export_aoti, load_package, parity, verify
from gdn_ops.export.program import flatten_state

import gdn_ops
from gdn_ops.files import Archive
from tests.export import modules

SIZES = ((1, 1), (2, 63), (1, 64), (3, 65), (2, 300))


def test_user_module_runs_alone(mixer, run_alone):
    model, result = mixer
    inputs = [modules.mixer_inputs(B, T, seed=T) for B, T in SIZES]
    results = run_alone([(result.files["forward"], x, {}) for x in inputs])
    with torch.no_grad():
        for x, got in zip(inputs, results):
            errors = parity.compare(got, model(*x), ["y", "state", "conv"])
            assert max(errors.values()) < 1e-5, errors


def test_packed_sequences_run_alone(packed, run_alone):
    model, result = packed
    inputs = [modules.packed_inputs(bounds, seed=1) for bounds in ([0, 1], [0, 0, 70, 71], [0, *range(3, 30, 3)])]
    results = run_alone([(result.files["forward"], (), x) for x in inputs])
    for x, got in zip(inputs, results):
        errors = parity.compare(got, model(**x), ["o", "state"])
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("bounds", [[0, 50], [1, 40], [0, 30, 20, 40]])
def test_bad_bounds_are_refused_in_the_package(packed, bounds):
    run = torch._inductor.aoti_load_package(str(packed[1].files["forward"]))
    inputs = modules.packed_inputs([0, 20, 40])
    with pytest.raises(RuntimeError, match="run"):
        run(**{**inputs, "cu_seqlens": torch.tensor(bounds)})
    run(**inputs)


def test_manifest_of_a_user_module(mixer):
    _, result = mixer
    manifest = json.loads((result.out_dir / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["format_version"] == 1 and manifest["target"] == "aoti" and manifest["device"] == "cpu"
    assert manifest["versions"] == {"gdn_ops": gdn_ops.__version__, "torch": torch.__version__}
    program = manifest["programs"]["forward"]
    assert {"gdn::causal_conv1d", "gdn::chunk_gated_delta_rule"} <= set(program["operators"])
    assert program["dynamic"] == {"batch": {"min": 1, "max": None}, "length": {"min": 1, "max": None}}
    shapes = {x["name"]: x["shape"] for x in program["inputs"]}
    assert shapes == {
        "x": ["batch", "length", 96],
        "gates.g": ["batch", "length", 2],
        "gates.beta": ["batch", "length", 2],
        "state": ["batch", 2, 16, 16],
    }
    outputs = {x["name"]: (x["dtype"], x["shape"]) for x in program["outputs"]}
    assert outputs["y"] == ("float32", ["batch", "length", 8])
    assert outputs["conv"] == ("float32", ["batch", 96, 3])
    data = (result.out_dir / program["file"]).read_bytes()
    assert program["size"] == len(data) and program["sha256"] == hashlib.sha256(data).hexdigest()


def test_parity_report_of_a_user_module(mixer, packed):
    report = json.loads((mixer[1].out_dir / "parity.json").read_text())
    assert report == mixer[1].parity
    assert report["passed"] and 0 < report["max_error"] < 1e-5 <= report["tolerance"]
    cases = {case["case"] for case in report["cases"]}
    assert {"example", "batch=1", "length=1", "length=63", "length=64", "length=65", "length=137"} <= cases
    assert not any("skipped" in case for case in report["cases"] + packed[1].parity["cases"])
    assert {"bounds=2", "length=137"} <= {case["case"] for case in packed[1].parity["cases"]}


def test_runner_checks_its_inputs(mixer):
    model, result = mixer
    package = load_package(result.out_dir)
    x, gates, state = modules.mixer_inputs(2, 9)
    with torch.no_grad():
        expected = model(x, gates, state)["y"]
    strided = x.mT.contiguous().mT
    assert parity.error(package.forward(strided, gates, state)["y"], expected) < 1e-5
    with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32, got torch\.float64"):
        package.forward(x.double(), gates, state)
    with pytest.raises(ValueError, match=r"state: expected shape .*'batch': 2.*got \(3, 2, 16, 16\)"):
        package.forward(x, gates, state.new_zeros(3, 2, 16, 16))
    with pytest.raises(ValueError, match="expected 4 tensors, got 3"):
        package.forward(x, gates, 0.0)
    with pytest.raises(ValueError, match="expected a program 'prefill', got forward"):
        package.step(x, {}) if "step" in package.programs else package._program("prefill")


def test_verify_finds_a_changed_file(mixer, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(mixer[1].out_dir, copy)
    assert verify(copy) == mixer[1].manifest
    with open(copy / "forward.pt2", "r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ValueError, match=r"forward\.pt2: expected sha256"):
        verify(copy)
    (copy / "forward.pt2").unlink()
    with pytest.raises(ValueError, match=r"expected the file forward\.pt2"):
        load_package(copy)
    with pytest.raises(ValueError, match=r"expected an export with a manifest\.json"):
        load_package(tmp_path)


def test_refusals_leave_nothing_behind(tmp_path, monkeypatch):
    model, inputs = modules.Packed(), modules.packed_inputs([0, 20])
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out_dir: expected a new or empty folder"):
        export_aoti(model, used, inputs)
    with pytest.raises(ValueError, match="out_dir: expected a folder, got the file"):
        export_aoti(model, used / "notes.txt", inputs)
    with pytest.raises(ValueError, match="example_inputs: expected"):
        export_aoti(model, tmp_path / "out")
    q, g = torch.randn(1, 4, 2, 8), -torch.rand(1, 4, 2)
    with pytest.raises(ValueError, match="gdn::recurrent_gated_delta_rule_: it has no C"):
        export_aoti(modules.InPlace(), tmp_path / "out", (q, g, torch.zeros(1, 2, 8, 8)))
    with pytest.raises(ValueError, match=r"model: expected tensors as results, got 0\.5 for half"):
        export_aoti(modules.Constants(), tmp_path / "out", (torch.ones(2, 3),))
    with pytest.raises(ValueError, match="expected it on cpu or cuda, got meta"):
        export_aoti(torch.nn.Linear(1, 1, device="meta"), tmp_path / "out", (torch.ones(1, 1, device="meta"),))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_an_export_that_is_off_raises_and_keeps_the_previous_one(tmp_path, monkeypatch):
    class Scaled(torch.nn.Module):
        factor = 2.0

        def forward(self, x):
            return x * self.factor

    model, out_dir = Scaled(), tmp_path / "out"
    first = export_aoti(model, out_dir, (torch.ones(2, 3),))
    again = export_aoti(model, out_dir, (torch.ones(2, 3),))
    assert again.files == first.files and verify(out_dir) == again.manifest
    load = torch._inductor.aoti_load_package
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x: load(path)(x) * 1.01)
    with pytest.raises(ParityError, match=r"forward example.*output is off by 0\.01"):
        export_aoti(model, out_dir, (torch.ones(2, 3),))
    assert verify(out_dir) == again.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_language_model_runs_alone(language_model, run_alone):
    model, result = language_model
    tolerance = parity.TOLERANCE[next(model.parameters()).dtype]
    vocabulary = model.config.vocab_size
    calls, expected = [], []
    with torch.no_grad():
        for B, T in SIZES:
            ids, token = torch.randint(vocabulary, (B, T)), torch.randint(vocabulary, (B,))
            calls.append((result.files["prefill"], (ids, flatten_state(model.init_state(B))), {}))
            logits, state = model.prefill(ids, model.init_state(B))
            expected.append((logits, flatten_state(state)))
            calls.append((result.files["step"], (token, flatten_state(state)), {}))
            logits, state = model.step(token, state)
            expected.append((logits, flatten_state(state)))
    for got, eager in zip(run_alone(calls), expected):
        errors = parity.compare(got, eager, ["logits", *eager[1]])
        assert max(errors.values()) <= tolerance, errors


def test_manifest_of_a_language_model(language_model):
    model, result = language_model
    manifest = result.manifest
    state = flatten_state(model.init_state(1))
    assert manifest["config"] == json.loads(json.dumps(model.config.to_dict()))
    assert manifest["dtype"] == str(next(model.parameters()).dtype).removeprefix("torch.")
    for name, length in (("prefill", ["batch", "T"]), ("step", ["batch"])):
        program = manifest["programs"][name]
        ids, *states = program["inputs"]
        assert ids == {"name": "input_ids", "role": "tensor", "dtype": "int64", "shape": length}
        assert [x["name"] for x in states] == list(state)
        for x in states:
            assert x["shape"] == ["batch", *state[x["name"]].shape[1:]] and x["role"] == "state"
            assert x["dtype"] == str(state[x["name"]].dtype).removeprefix("torch.")
        assert program["outputs"][0]["name"] == "logits" and program["outputs"][1:] == states
        assert program["states"] == {name: name for name in state}
        assert all(bounds == {"min": 1, "max": None} for bounds in program["dynamic"].values())
    report = result.parity
    prefill = {case["case"] for case in report["cases"] if case["program"] == "prefill"}
    assert {"T=1", "T=C-1", "T=C", "T=C+1", "ragged", "ragged, continued"} <= prefill
    assert {case["case"] for case in report["cases"] if case["program"] == "step"} == {"prefill then decode"}
    assert report["passed"] and report["max_error"] <= report["tolerance"]


@torch.no_grad()
def test_package_generates_the_tokens_that_eager_does(language_model):
    model, result = language_model
    if next(model.parameters()).dtype != torch.float32:
        pytest.skip("16-bit rounding may change an argmax")
    package = load_package(result.out_dir)
    ids = torch.randint(model.config.vocab_size, (2, 21))
    logits, state = package.prefill(ids)
    eager, eager_state = model.prefill(ids, model.init_state(2))
    for _ in range(8):
        token = logits.reshape(2, -1, logits.shape[-1])[:, -1].argmax(-1)
        assert torch.equal(token, eager.reshape(2, -1, eager.shape[-1])[:, -1].argmax(-1))
        logits, state = package.step(token, state)
        eager, eager_state = model.step(token, eager_state)


def test_plain_torch_usage_of_the_docstring(language_model, monkeypatch):
    from gdn_ops.export import aoti

    _, result = language_model
    code = aoti.__doc__.split("runs it::")[1].split("In C++")[0]
    scope = {}
    exec("\n".join(line[4:] for line in code.splitlines()).replace("out/", f"{result.out_dir}/"), scope)
    assert list(scope["state"]) == [x["name"] for x in scope["states"]]
    assert scope["logits"].isfinite().all()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    """Told of it at once, torch's writer would end the process."""
    monkeypatch.setattr(aoti, "Archive", lambda path, mode: Archive("/dev/full", mode))
    with pytest.raises(OSError, match="No space left on device") as raised:
        export_aoti(torch.nn.Linear(3, 2), tmp_path / "out", (torch.ones(1, 3),))
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
