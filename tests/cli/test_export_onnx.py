"""``gdn export --target onnx27 | ort | portable``: a file that writes what eager writes, and a table that is true."""

from __future__ import annotations

import json
import subprocess
import sys

import gdn_ops.export
import pytest
import torch
from gdn_ops.export import ParityError

from gdn_ops.cli import generate_onnx, measure

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tests.cli import counting_model
from tests.cli.conftest import run_gdn
from tests.export.onnx_exports import TARGETS


@pytest.fixture(scope="module", params=TARGETS)
def exported_onnx(request, tmp_path_factory, trained):
    out = tmp_path_factory.mktemp("exported") / request.param
    result = run_gdn("export", trained, "--target", request.param, "--out", out)
    assert result.code == 0, result.err
    return request.param, out, result


def test_the_table_is_what_was_measured(trained, exported_onnx):
    target, out, result = exported_onnx
    rows = [measure.Row(**row) for row in json.loads((out / "measured.json").read_text())]
    cases = json.loads((out / "parity.json").read_text())["cases"]
    assert [(row.target, row.program) for row in rows] == [
        ("eager", "prefill"), ("eager", "step"), (target, "prefill"), (target, "step"),
    ]  # fmt: skip
    for row in rows[:2]:
        assert (row.file, row.size, row.parity) == (
            "model.safetensors", (trained / "model.safetensors").stat().st_size, None,
        )  # fmt: skip
    for row in rows[2:]:
        assert row.file == "model.onnx" and row.size == sum(p.stat().st_size for p in out.glob("model.onnx*"))
        assert row.parity == max(case["error"] for case in cases if case.get("program") == row.program) < 1e-4
    for row in rows:
        line = next(line for line in result.out.splitlines() if line.split()[:2] == [row.target, row.program])
        parity = "(reference)" if row.parity is None else f"{row.parity:.1e}"
        assert line.split()[2:] == [row.file, f"{row.size / 1e6:.2f}", "MB", parity, f"{row.speed:,.0f}"]
    names = {path.name for path in out.iterdir()} - {"model.onnx.data"}
    assert names == {"generate.py", "manifest.json", "measured.json", "model.onnx", "parity.json", "text.json"}


def test_the_file_writes_what_eager_writes(gdn, trained, exported_onnx):
    """By the program in the folder, that is, in a process without torch and without this package."""
    _, out, _ = exported_onnx
    words = ["--prompt", "gate café ", "--temperature", "0", "--max-new-tokens", "60"]
    eager = gdn("generate", trained, *words, "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-I", str(out / "generate.py"), *words], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout == eager.out and len(eager.out) > 40, done.stderr


def test_an_onnx_export_may_be_replaced_and_is_no_model(gdn, trained, exported_onnx, tmp_path):
    _, out, _ = exported_onnx
    result = gdn("export", out, "--target", "portable", "--out", tmp_path / "again")
    assert result.code == 2 and "DIR: expected a trained model's folder, got the export" in result.err


@pytest.mark.parametrize("target", TARGETS)
def test_another_device_is_refused(gdn, trained, tmp_path, target):
    result = gdn("export", trained, "--target", target, "--device", "cuda", "--out", tmp_path / "out")
    assert result.code == 2 and f"--device: expected auto or cpu with --target {target}" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ParityError("logits are off by 0.1"), 1, "does not give eager's numbers; nothing was written: logits are off"),
        (ValueError("target: 'onnx27' has no bfloat16"), 2, "gdn: target: 'onnx27' has no bfloat16"),
    ],
)
def test_what_the_exporter_refuses(gdn, trained, tmp_path, monkeypatch, error, code, told):
    def fails(model, out_dir, target):
        raise error

    monkeypatch.setattr(gdn_ops.export, "export_onnx", fails, raising=False)
    result = gdn("export", trained, "--target", "onnx27", "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert result.code == code and told in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_library_that_is_missing(gdn, trained, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    result = gdn("export", trained, "--target", "ort", "--out", tmp_path / "out")
    assert result.code == 2 and f"needs {library}: pip install 'gdn-ops[onnx]'" in result.err
    assert not list(tmp_path.iterdir())


def test_what_is_measured_is_the_file(tmp_path):
    """The runner of the table's speeds gives the file's logits and carries its states."""
    runner = measure.OnnxRunner(generate_onnx.Model(counting_model.write(tmp_path), threads=1))
    ids = [5, 6, 7]
    logits, state = runner.prefill(torch.tensor([ids, [1, 2, 3]]), runner.init_state(2))
    assert logits.shape == (2, 3, counting_model.VOCABULARY)
    said = []
    for _ in range(4):
        token = logits[:, -1].argmax(-1) if logits.dim() == 3 else logits.argmax(-1)
        said.append(token[0].item())
        logits, state = runner.step(token, state)
        assert logits.shape == (2, counting_model.VOCABULARY)
    assert said == counting_model.foretold(ids, 4)
