"""``gdn export``: an artifact that writes what the model writes, and a table that is true."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time

import gdn_ops.export
import pytest
import torch
from gdn_ops.export import ParityError, verify

from gdn_ops import files
from gdn_ops.cli import export, measure


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
        (["/no/such/folder"], "DIR: expected a trained model's folder, got /no/such/folder, which does not exist"),
        (
            ["{trained}/config.json"],
            "DIR: expected a trained model's folder, got {trained}/config.json, which is a file",
        ),
        (["{trained}/checkpoints"], "DIR: expected config.json and model.safetensors in it"),
        (["{exported}"], "DIR: expected a trained model's folder, got the export"),
        (["{trained}", "--target", "onyx"], "'onyx' is not one of 'aoti'"),
        (["{trained}", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["{trained}", "--out", "{trained}"], "--out: out_dir: expected a new or empty folder or a previous export"),
        (["{trained}", "--out", "{trained}/config.json"], "--out: out_dir: expected a folder, got the file"),
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
        (ValueError("model: program 'step' cannot go"), 2, "gdn: model: program 'step' cannot go"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "gdn: --out: [Errno 28] No space left on device"),
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


def test_a_folder_of_something_else_is_kept_whatever_its_manifest(gdn, trained, tmp_path):
    """Many a project has a manifest.json; only an export's may be replaced."""
    (tmp_path / "manifest.json").write_text('{"name": "another project"}')
    (tmp_path / "work.txt").write_text("years of it")
    result = gdn("export", trained, "--out", tmp_path)
    assert result.code == 2 and "--out: out_dir: expected a new or empty folder or a previous export" in result.err
    assert (tmp_path / "work.txt").read_text() == "years of it"


@pytest.fixture
def exporter(monkeypatch):
    """Puts a function of the folder in the place of what the export of ``--target aoti`` does."""

    def put(write):
        def target(model, work, engine, tell):
            write(work)
            return lambda directory: []

        monkeypatch.setitem(export.TARGETS, export.Target.aoti, target)

    return put


def refused(result, told):
    """With one line for what went wrong, below that of the export's start and those of its time."""
    *before, line = result.err.splitlines()
    assert result.code == 2 and not result.out and line.startswith(f"gdn: --out: {told}"), result.err
    assert all(line.startswith(("exporting ", "measuring")) for line in before)


def test_what_comes_into_the_folder_during_the_export_is_kept(gdn, trained, tmp_path, exporter):
    out = tmp_path / "out"

    def write(work):
        out.mkdir()
        (out / "notes.txt").write_text("precious")

    exporter(write)
    refused(gdn("export", trained, "--out", out), "out_dir: expected a new or empty folder or a previous export, got")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.read_text() for path in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("earlier", [True, False])
def test_an_export_goes_where_a_link_leads(gdn, trained, tmp_path, exporter, earlier):
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to("disk/real")
    if earlier:
        real.mkdir(parents=True)
        (real / "manifest.json").write_text('{"format": "gdn_ops.aoti", "files": []}')
    exporter(lambda work: (work / "new").write_text("new"))
    assert gdn("export", trained, "--out", link).code == 0
    assert link.is_symlink() and {path.name for path in real.iterdir()} == {"new", "text.json", "measured.json"}
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(gdn, trained, exporter):
    exporter(lambda work: pytest.fail("the export began"))
    result = gdn("export", trained, "--out", "/proc/out")
    refused(result, "[Errno 2] No such file or directory: '/proc/.out.")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("step", ["write_file", "sync"])
def test_a_disk_that_fills_leaves_nothing_behind(gdn, trained, tmp_path, exporter, monkeypatch, step):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    exporter(lambda work: None)
    monkeypatch.setattr(files, step, full)
    refused(gdn("export", trained, "--out", tmp_path / "out"), "[Errno 28] No space left on device")
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_nothing_behind(trained, tmp_path):
    """Once the exporter has a folder of its own, beside the command's."""
    command = [sys.executable, "-c", "from gdn_ops.cli import main; main()", "export", trained, "--device", "cpu"]
    command = [str(word) for word in (*command, "--out", tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 143 and not out and "gdn:" not in err, err
    assert not list(tmp_path.iterdir())
