"""``gdn export --target tensorrt``: an engine with options, and a table that does not claim what was not run."""

from __future__ import annotations

import json
import subprocess
import sys

import gdn_ops.export
import pytest
from gdn_ops.export import ParityError, verify

from gdn_ops.cli import measure

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gdn-ops[tensorrt-rtx]'")

from tests.cli.conftest import run_gdn

OPTIONS = ("--runtime", "tensorrt-rtx", "--compute-capabilities", "sm_89", "--max-batch", 4, "--max-length", 300)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, trained):
    out = tmp_path_factory.mktemp("exported") / "engine"
    result = run_gdn("export", trained, "--target", "tensorrt", "--out", out, *OPTIONS)
    assert result.code == 0, result.err
    return out, result


def test_the_options_are_in_the_manifest(engine):
    out, _ = engine
    described = verify(out)["tensorrt"]
    assert described["compute_capabilities"] == ["sm_89"] and described["path"] == "tensorrt-rtx portable"
    assert [x["sizes"] for x in described["profiles"]] == [
        {"batch": [1, 1, 4], "T": [1, 1, 1]}, {"batch": [1, 1, 4], "T": [2, 300, 300]},
    ]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "layers.json", "manifest.json", "measured.json", "model.engine", "model.onnx", "parity.json", "text.json",
    }  # fmt: skip


def test_the_table_does_not_time_what_was_not_run(engine):
    out, result = engine
    rows = [measure.Row(**row) for row in json.loads((out / "measured.json").read_text())]
    assert [(row.target, row.program) for row in rows] == [
        ("eager", "prefill"), ("eager", "step"), ("tensorrt", "prefill"), ("tensorrt", "step"),
    ]  # fmt: skip
    cases = json.loads((out / "parity.json").read_text())["cases"]
    for row in rows[2:]:
        assert (row.file, row.size, row.speed) == ("model.engine", (out / "model.engine").stat().st_size, None)
        assert row.parity == max(case["error"] for case in cases if case["program"] == row.program) < 1e-4
        line = next(line for line in result.out.splitlines() if line.split()[:2] == ["tensorrt", row.program])
        assert line.split()[2:] == [
            "model.engine", f"{row.size / 1e6:.2f}", "MB", f"{row.parity:.1e}", "not", "run",
        ]  # fmt: skip
    assert all(row.speed > 0 for row in rows[:2])


def test_the_phases_of_the_build_are_lines_where_there_is_no_terminal(engine):
    lines = [line.split(":")[0] for line in engine[1].err.splitlines()]
    assert lines[0].startswith("exporting ") and lines.count("Building engine") == lines.count("Optimizing graph") == 1


def test_the_onnx_file_in_the_folder_writes_what_eager_writes(trained, engine):
    """``gdn generate`` becomes the process that runs the file, which is what the engine was made from."""
    words = ["--prompt", "gate ", "--max-new-tokens", "40", "--temperature", "0"]
    command = [sys.executable, "-c", "from gdn_ops.cli import main; main()", "generate"]
    texts = [
        subprocess.run([*command, str(folder), *words], capture_output=True, text=True, timeout=300)
        for folder in (trained, engine[0])
    ]
    assert all(done.returncode == 0 for done in texts), texts[1].stderr
    assert texts[0].stdout == texts[1].stdout and len(texts[0].stdout) > 30
    assert texts[1].stderr.startswith("tensorrt on ONNX Runtime: ")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--target", "portable", "--max-batch", 2], "--max-batch: expected it with --target tensorrt only, got --tar"),
        (["--target", "aoti", "--version-compatible"], "--version-compatible: expected it with --target tensorrt only"),
        (["--target", "ort", "--compute-capabilities", "sm_89"], "--compute-capabilities: expected it with --target"),
        (["--target", "tensorrt", "--max-length", 1], "--max-length: expected an integer of at least 2, got '1'"),
        (["--target", "tensorrt", "--runtime", "trt"], "'trt' is not one of 'tensorrt', 'tensorrt-rtx'"),
        (["--target", "tensorrt", "--device", "cuda"], "--device: expected auto or cpu with --target tensorrt"),
        ([*OPTIONS, "--target", "tensorrt", "--timing-cache", "x"], "timing_cache: TensorRT-RTX 1."),
        (["--target", "tensorrt", "--compute-capabilities", "sm_90"], "Hopper needs full TensorRT; got 'sm_90'"),
    ],
)
def test_refusals(gdn, trained, tmp_path, args, told):
    result = gdn("export", trained, "--out", tmp_path / "out", *args)
    assert result.code == 2 and not result.out and told in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ParityError("logits are off by 0.1"), 1, "does not give eager's numbers; nothing was written: logits are off"),
        (RuntimeError("tensorrt-rtx 1.7 built no engine: no"), 1, "no engine; nothing was written: tensorrt-rtx 1.7"),
        (RuntimeError("runtime: tensorrt 11 builds on the GPU"), 2, "gdn: runtime: tensorrt 11 builds on the GPU"),
        (ModuleNotFoundError("runtime: build_tensorrt needs it"), 2, "gdn: runtime: build_tensorrt needs it"),
        (ValueError("profiles: expected a dict"), 2, "gdn: profiles: expected a dict"),
    ],
)
def test_what_the_builder_refuses(gdn, trained, tmp_path, monkeypatch, error, code, told):
    def fails(model, out_dir, **options):
        raise error

    monkeypatch.setattr(gdn_ops.export, "build_tensorrt", fails)
    result = gdn("export", trained, "--target", "tensorrt", "--out", tmp_path / "out")
    assert result.code == code and told in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())
