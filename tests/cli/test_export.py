"""``gdn export``: an artifact that writes what the model writes, and a table that is true."""

from __future__ import annotations

import json
import subprocess
import sys

import gdn_ops.export
import pytest
import torch
from gdn_ops.export import ParityError, verify
from gdn_ops.export.destination import replacing

from gdn_ops.cli import measure


def test_the_table_is_what_was_measured(trained, exported):
    out, result = exported
    manifest = verify(out)
    rows = [measure.Row(**row) for row in json.loads((out / "measured.json").read_text())]
    programs = manifest["programs"]
    cases = json.loads((out / "parity.json").read_text())["cases"]
    assert [(row.target, row.program) for row in rows] == [
        ("eager", "prefill"), ("eager", "step"), ("aoti", "prefill"), ("aoti", "step"),
    ]  # fmt: skip
    for row in rows[:2]:
        assert (row.file, row.size) == ("model.safetensors", (trained / "model.safetensors").stat().st_size)
        assert row.parity is None
    for row in rows[2:]:
        assert (row.file, row.size) == (f"{row.program}.pt2", programs[row.program]["size"])
        assert row.parity == max(case["error"] for case in cases if case["program"] == row.program) < 1e-4
    for row in rows:
        line = next(line for line in result.out.splitlines() if line.split()[:2] == [row.target, row.program])
        parity = "(reference)" if row.parity is None else f"{row.parity:.1e}"
        assert line.split()[2:] == [row.file, f"{row.size / 1e6:.2f}", "MB", parity, f"{row.speed:,.0f}"]
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "measured.json", "parity.json", "prefill.pt2", "step.pt2", "text.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_artifact_writes_what_eager_writes(gdn, trained, exported):
    """Greedy text in a fresh process, and drawn text in this one."""
    out, _ = exported
    common = ["--prompt", "gate ", "--max-new-tokens", 60]
    eager = gdn("generate", trained, *common, "--temperature", 0, "--device", "cpu")
    code = "from gdn_ops.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", out, *common, "--temperature", 0]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == eager.out, done.stderr
    assert done.stderr.startswith("aoti on cpu: prompt 5 tokens at ")
    drawn = [gdn("generate", folder, *common, "--seed", 3, "--device", "cpu") for folder in (trained, out)]
    assert drawn[0].out == drawn[1].out and len(drawn[0].out) > 40


def test_parity_is_the_worst_case_of_each_program():
    cases = [
        {"program": "prefill", "case": "T=1", "error": 1e-7},
        {"program": "step", "case": "a", "error": 3e-7},
        {"program": "prefill", "case": "T=C", "error": 2e-7},
        {"program": "step", "case": "b", "skipped": "no"},
    ]
    assert measure.parities(cases) == {"prefill": 2e-7, "step": 3e-7}


def test_speeds_are_of_the_calls_made(monkeypatch):
    """Targets take turns, and tokens/s is tokens over the seconds that a call took."""
    calls, now = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    class Clockwork:
        def __init__(self, name):
            self.name = name

        def init_state(self, batch):
            return None

        def prefill(self, ids, state):
            calls.append((self.name, tuple(ids.shape)))
            now[0] += 0.5 if self.name == "a" else 0.25
            return torch.zeros(*ids.shape, 4), state

        def step(self, ids, state):
            calls.append((self.name, "step"))
            now[0] += 0.01
            return torch.zeros(1, 4), state

    speeds = measure.speeds({"a": Clockwork("a"), "b": Clockwork("b")}, torch.device("cpu"), 4)
    assert speeds["a"] == {"prefill": pytest.approx(measure.LENGTH / 0.5), "step": pytest.approx(100)}
    assert speeds["b"] == {"prefill": pytest.approx(measure.LENGTH / 0.25), "step": pytest.approx(100)}
    prefills = [name for name, what in calls if what == (1, measure.LENGTH)]
    assert prefills == ["a", "b"] * (measure.ROUNDS + 1)
    assert calls.count(("b", "step")) == measure.STEPS * (measure.ROUNDS + 1)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["/no/such/folder"], "DIR: expected a trained model's folder, got /no/such/folder"),
        (["{trained}/checkpoints"], "DIR: expected config.json and model.safetensors in it"),
        (["{exported}"], "DIR: expected a trained model's folder, got the export"),
        (["{trained}", "--target", "onyx"], "'onyx' is not one of 'aoti'"),
        (["{trained}", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["{trained}", "--out", "{trained}"], "--out: expected a new or empty folder or an earlier export"),
        (["{trained}", "--out", "{trained}/config.json"], "--out: expected a folder, got the file"),
        (["{trained}", "--out", "{trained}/config.json/out"], "got {trained}/config.json/out below the file"),
    ],
)
def test_refusals(gdn, trained, exported, tmp_path, args, told):
    def fill(word):
        return str(word).replace("{trained}", str(trained)).replace("{exported}", str(exported[0]))

    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    result = gdn("export", "--out", tmp_path / "out", *map(fill, args))
    assert result.code == 2 and not result.out and fill(told) in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ParityError("logits are off by 0.1"), 1, "does not give eager's numbers; nothing was written: logits are off"),
        (RuntimeError("exporting needs a C++ compiler: install g++"), 2, "needs a C++ compiler: install g++"),
        (ValueError("model: program 'step' cannot go"), 2, "model: program 'step' cannot go"),
    ],
)
def test_an_export_that_fails_keeps_the_one_before(gdn, trained, exported, monkeypatch, error, code, told):
    def fails(model, out):
        raise error

    monkeypatch.setattr(gdn_ops.export, "export_aoti", fails)
    out, _ = exported
    result = gdn("export", trained, "--out", out)
    assert result.code == code and told in result.err and "Traceback" not in result.err
    assert verify(out) and [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.gpu
def test_an_export_runs_only_where_it_was_made_for(gdn, exported):
    result = gdn("generate", exported[0], "--device", "cuda")
    assert result.code == 2 and "--device: expected cpu, which" in result.err


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        with replacing(target) as work:
            (work / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == content
    with pytest.raises(KeyError), replacing(target) as work:
        raise KeyError("stop")
    assert (target / "file").read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_kept_whatever_its_manifest(gdn, trained, tmp_path):
    """Many a project has a manifest.json; only an export's may be replaced."""
    (tmp_path / "manifest.json").write_text('{"name": "another project"}')
    (tmp_path / "work.txt").write_text("years of it")
    result = gdn("export", trained, "--out", tmp_path)
    assert result.code == 2 and "--out: expected a new or empty folder or an earlier export" in result.err
    assert (tmp_path / "work.txt").read_text() == "years of it"
