"""``gdn train``: what it writes, that it can be stopped anywhere and go on bit for bit, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from gdn_ops.cli import checkpoint, history, training
from gdn_ops.models import HybridLM
from gdn_ops.models.hybrid import ACTIVATION_CHECKPOINTING
from tests.cli.conftest import SIZES, SMALL


def losses(run) -> list[float]:
    entries = history.read(run / "train.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def test_what_a_run_leaves(trained):
    names = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    assert names == {
        "checkpoints", "config.json", "loss.png", "model.safetensors", "text.json", "tokens.bin", "tokens.json",
        "train.json", "train.jsonl",
    }  # fmt: skip
    model = HybridLM.from_pretrained(trained)
    assert {name: getattr(model.config, name) for name in SMALL} == SMALL and model.config.vocab_size == 256
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000006"]
    again = HybridLM.from_pretrained(trained / "checkpoints" / "step-00000006")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_is_true(trained):
    entries = history.read(trained / "train.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry["tokens"] for entry in entries] == [140 * n for n in range(1, 7)]
    recipe = training.Recipe(**{k: v for k, v in json.loads((trained / "train.json").read_text()).items()
                                if k not in ("format", "version")})  # fmt: skip
    assert [entry["lr"] for entry in entries] == [training.learning_rate(recipe, n) for n in range(1, 7)]
    assert all(entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0 for entry in entries)
    assert all("eval_loss" in entry for entry in entries)  # a tenth of six steps is every step
    assert abs(entries[0]["loss"] - math.log(256)) < 0.3 and entries[-1]["loss"] < entries[0]["loss"] - 0.1


def test_the_first_loss_is_the_models(trained, corpus):
    """On the batch that the corpus gives for (seed, step 1) and a model of this seed."""
    import numpy as np

    from gdn_ops.cli.corpus import split
    from gdn_ops.models import HybridConfig

    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", **SMALL))
    batch = split(np.fromfile(trained / "tokens.bin", np.uint8), 0.01, 70).batch(0, 1, 2, 70)
    assert losses(trained)[0] == model(batch, labels=batch, return_logits=False).loss.item()


@pytest.mark.parametrize("stop", [1, 3])
def test_stopping_and_going_on_changes_nothing(gdn, trained, corpus, tmp_path, stop):
    run = tmp_path / "run"
    args = ["train", *SIZES, "--data", corpus, "--steps", 6, "--out", run]
    first = gdn(*args, "--stop-at", stop)
    assert first.code == 0 and f"the same command goes on from step {stop}" in first.out
    assert not (run / "model.safetensors").exists()
    second = gdn(*args)
    assert second.code == 0 and f"continuing after step {stop} of 6" in second.err
    assert losses(run) == losses(trained)
    whole, parts = HybridLM.from_pretrained(trained), HybridLM.from_pretrained(run)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    third = gdn(*args, "--resume")
    assert third.code == 0 and losses(run) == losses(trained)


def test_a_batch_in_parts_is_the_same_batch(gdn, trained, corpus, tmp_path):
    sizes = [*SIZES, "--batch-size", 1, "--accumulate", 2]
    result = gdn("train", *sizes, "--data", corpus, "--steps", 6, "--out", tmp_path / "run")
    assert result.code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.parametrize("moment", ["model", "state", "rename", "log ahead"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(gdn, trained, corpus, tmp_path, monkeypatch, moment):
    """At each moment of the second save; then the run goes on from the first."""
    run = tmp_path / "run"
    args = ["train", *SIZES, "--data", corpus, "--steps", 6, "--out", run, "--save-every", 2]
    calls = {"count": 0}

    def crash_on_second(function):
        def call(*a, **k):
            calls["count"] += 1
            if calls["count"] == 2:
                raise SystemError("power cut")
            return function(*a, **k)

        return call

    with monkeypatch.context() as patch:
        if moment == "model":
            patch.setattr(HybridLM, "save_pretrained", crash_on_second(HybridLM.save_pretrained))
        elif moment == "state":
            patch.setattr(torch, "save", crash_on_second(torch.save))
        elif moment == "rename":
            patch.setattr(checkpoint, "sync", crash_on_second(checkpoint.sync))
            calls["count"] = -1  # a save syncs twice: the folder's files, then the name
        else:
            patch.setattr(history.History, "sync", crash_on_second(history.History.sync))
        with pytest.raises(SystemError, match="power cut"):
            gdn(*args)
    newest = checkpoint.newest(run)
    assert newest.name == "step-00000002" and HybridLM.from_pretrained(newest).num_parameters() > 0
    assert len(losses(run)) == 4  # two steps beyond the checkpoint
    (run / "checkpoints" / ".step-00000004.left").mkdir()  # as a kill, unlike an exception, leaves it
    with open(run / "train.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    result = gdn(*args)
    assert result.code == 0 and "continuing after step 2" in result.err
    assert losses(run) == losses(trained)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_killed_process_goes_on(trained, corpus, tmp_path, sent, code):
    """A real process, killed without warning in the middle of its saves, or ended by a scheduler."""
    run = tmp_path / "run"
    args = [*SIZES, "--data", corpus, "--steps", 6, "--save-every", 1, "--out", run]
    command = [sys.executable, "-c", "from gdn_ops.cli import main; main()", "train", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and checkpoint.newest(run) is None:
        time.sleep(0.002)
    process.send_signal(sent)
    process.wait()
    assert process.returncode == code
    assert sent == signal.SIGKILL or not list((run / "checkpoints").glob(".*"))
    assert HybridLM.from_pretrained(checkpoint.newest(run)).num_parameters() > 0
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stderr and "Traceback" not in done.stderr
    assert losses(run) == losses(trained)


def test_compiled_training_agrees(gdn, corpus, tmp_path):
    """One layer of Gated DeltaNet, because the compiler takes most of a minute for more on one core."""
    for how in ("--compile", "--no-compile"):
        args = [*SIZES, "--set", "num_hidden_layers=1", how, "--data", corpus, "--steps", 3, "--eval-batches", 0]
        result = gdn("train", *args, "--out", tmp_path / how)
        assert result.code == 0 and ("compiling" in result.err) == (how == "--compile"), result.err
    assert losses(tmp_path / "--compile") == pytest.approx(losses(tmp_path / "--no-compile"), rel=1e-5)


@pytest.mark.parametrize("kind", ACTIVATION_CHECKPOINTING)
def test_checkpointing_changes_no_loss(gdn, trained, corpus, tmp_path, kind):
    """Each kind of the model's is a choice, and what is computed again is the same, bit for bit."""
    result = gdn(
        "train", *SIZES, "--data", corpus, "--steps", 6, "--stop-at", 3, "--checkpointing", kind,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert losses(tmp_path / "run") == losses(trained)[:3]


def test_compilation_is_the_default(gdn, corpus, tmp_path, monkeypatch):
    compiled = []

    def compile_nothing(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    args = [word for word in SIZES if word != "--no-compile"]
    assert gdn("train", *args, "--data", corpus, "--steps", 1, "--out", tmp_path / "run").code == 0
    assert compiled == [{"fullgraph": True}]


@pytest.mark.parametrize("end, code", [(KeyboardInterrupt, 130), (SystemExit, 143)])
@pytest.mark.parametrize("save_every", [1, 9])
def test_an_interrupted_run_says_how_it_goes_on(gdn, corpus, tmp_path, monkeypatch, end, code, save_every):
    advance = training.Run._advance

    def interrupted(run, *args):
        if run.step == 2:
            raise end(code)
        return advance(run, *args)

    monkeypatch.setattr(training.Run, "_advance", interrupted)
    result = gdn("train", *SIZES, "--data", corpus, "--steps", 3, "--save-every", save_every, "--out", tmp_path / "run")
    later = "goes on from the last checkpoint" if save_every == 1 else "begins anew: there is no checkpoint yet"
    assert result.code == code
    assert result.err.splitlines()[-1] == f"interrupted after step 2; the same command {later}"


def test_a_run_that_is_not_there_is_not_made_by_going_on_with_it(gdn, corpus, tmp_path):
    result = gdn("train", *SIZES, "--data", corpus, "--steps", 1, "--resume", "--out", tmp_path / "run")
    assert result.code == 2 and "--resume: expected a run with a checkpoint in" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fills", ["model", "state"])
def test_a_disk_that_fills_is_one_line(gdn, corpus, tmp_path, monkeypatch, fills):
    """Neither safetensors nor torch makes an OSError of it themselves."""
    full = "Error while serializing: I/O error: No space left on device (os error 28)"

    def save_file(weights, path, metadata):
        raise SafetensorError(full)

    if fills == "model":
        monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    else:
        monkeypatch.setattr(
            checkpoint, "Archive", lambda path, mode, whole=checkpoint.Archive: whole("/dev/full", mode)
        )
    args = [*SIZES, "--data", corpus, "--steps", 1, "--out", tmp_path / "run"]
    told = f"got [Errno 28] {full if fills == 'model' else 'No space left on device'}"
    result = gdn("train", *args)
    assert result.code == 2 and result.err.splitlines()[-1].startswith("gdn: --out: expected"), result.err
    assert result.err.splitlines()[-1].endswith(told) and "Traceback" not in result.err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.undo()
    assert gdn("train", *args).code == 0


@pytest.mark.gpu
def test_training_on_cuda_in_bfloat16(gdn, trained, corpus, tmp_path):
    sizes = [*SIZES, "--device", "cuda", "--compile"]
    result = gdn("train", *sizes, "--data", corpus, "--steps", 6, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run" / "train.json").read_text())["dtype"] == "bfloat16"
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=2e-2)


def refused(gdn, told, *args):
    result = gdn("train", *args)
    assert result.code == 2 and not result.out, result
    assert told in result.err and result.err.splitlines()[-1].startswith("gdn"), result.err
    assert "Traceback" not in result.err
    return result


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--seq-len", 71], "--seq-len: expected 70 as in the run in"),
        (["--lr", 0.5], "--lr: expected 0.002 as in the run in"),
        (["--steps", 7], "--steps: expected 6 as in the run in"),
        (["--seed", 1], "--seed: expected 0 as in the run in"),
        (["--dtype", "bfloat16"], "--dtype: expected float32 as in the run in"),
        (["--set", "window=8"], "--preset, --set: window expected 16 as in the run in"),
        (["--data", __file__], "--data, --tokenizer: expected the text and tokenizer of the run in"),
        (["--no-resume"], "--no-resume: expected a new or empty folder"),
    ],
)
def test_a_run_goes_on_only_with_its_own_options(gdn, trained, corpus, args, told):
    before = (trained / "train.jsonl").read_bytes()
    refused(gdn, told, *SIZES, "--data", corpus, "--steps", 6, "--out", trained, *args)
    assert (trained / "train.jsonl").read_bytes() == before


def test_before_the_first_checkpoint_nothing_binds(gdn, corpus, tmp_path):
    run = tmp_path / "run"
    common = [*SIZES, "--data", corpus, "--steps", 1, "--out", run]
    refused(gdn, "--data: expected at least 60000 tokens for --seq-len 30000", *common, "--seq-len", 30000)
    refused(gdn, "--resume: expected a run with a checkpoint", *common, "--resume")
    assert gdn("train", *common).code == 0 and len(losses(run)) == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--preset", "huge"], "preset: expected one of tiny, "),
        (["--set", "heads=3"], "heads: expected one of the fields"),
        (["--set", "window=-1"], "window: expected a positive integer, got -1"),
        (["--set", "window"], "--set: expected FIELD=VALUE, got 'window'"),
        (["--set", "vocab_size=100"], "--set: expected vocab_size of at least the tokenizer's 256, got 100"),
        (["--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "mps"], "--device: expected auto, cpu, cuda or cuda:N, got 'mps'"),
        (["--device", "cuda:99"], "CUDA devices, got 'cuda:99'"),
        (["--data", "/no/such/path"], "--data: expected a file or folder, got /no/such/path"),
        (["--tokenizer", "/no/such/file"], "--tokenizer: "),
        (["--tokenizer", __file__], "--tokenizer: expected a Hugging Face tokenizer.json, got "),
        (["--warmup", 7], "--warmup: expected at most --steps 6, got 7"),
        (["--held-out", 0.9], "--held-out: expected a number of at least 0 and at most 0.5, got '0.9'"),
    ],
)
def test_refusals_before_anything_is_written(gdn, corpus, tmp_path, args, told):
    refused(gdn, told, *SIZES, "--data", corpus, "--steps", 6, "--out", tmp_path / "run", *args)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_for_us(gdn, corpus, tmp_path):
    common = [*SIZES, "--data", corpus, "--steps", 6, "--out"]
    (tmp_path / "notes.txt").write_text("mine")
    refused(gdn, "with notes.txt", *common, tmp_path)
    refused(gdn, "--out: expected a folder that can be written", *common, tmp_path / "notes.txt")
    with training.claimed(tmp_path / "busy"):
        refused(gdn, "that no other gdn train is using", *common, tmp_path / "busy")


def test_a_run_below_its_data(gdn, corpus, tmp_path, monkeypatch):
    """It never reads its own files: not when it goes on, and not when it starts again before a checkpoint."""
    shutil.copytree(corpus, tmp_path / "text")
    monkeypatch.chdir(tmp_path / "text")
    args = ["train", *SIZES, "--data", ".", "--steps", 2, "--out", "run"]
    assert gdn(*args, "--stop-at", 1).code == 0
    first = Path("run/tokens.bin").read_bytes()
    result = gdn(*args)
    assert result.code == 0 and "continuing after step 1 of 2" in result.err, result.err
    shutil.rmtree("run/checkpoints")
    assert gdn(*args).code == 0 and Path("run/tokens.bin").read_bytes() == first
    refused(gdn, "--data: expected text outside of --out run, got run", *args[1:], "--data", "run")


def test_damaged_runs_are_named(gdn, trained, corpus, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    common = [*SIZES, "--data", corpus, "--steps", 6, "--out", run]
    state = run / "checkpoints" / "step-00000006" / "training.pt"
    state.write_bytes(state.read_bytes()[:200])
    refused(gdn, "expected a whole checkpoint in", *common)
    (state.parent / "model.safetensors").write_bytes(b"")
    refused(gdn, "expected a safetensors file", *common)
    recipe = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps({**recipe, "config": None}))
    refused(gdn, f"--out: expected the fields of a model as config in {run / 'train.json'}, got None", *common)
    (run / "train.json").write_text("{}")
    refused(gdn, "train.json to describe a run", *common)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    refused(gdn, f"--out: expected a folder of checkpoints, got the file {run / 'checkpoints'}", *common)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: {}, "KeyError: 'optimizer'"),
        (lambda state: [], "TypeError: "),
        (lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}}, "parameter groups"),
        (lambda state: {**state, "random": {"cpu": torch.zeros(3, dtype=torch.uint8)}}, "RNG state"),
        (lambda state: {**state, "step": 5}, "step 5"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_the_checkpoints(gdn, trained, corpus, tmp_path, damage, told):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000006"
    torch.save(damage(torch.load(path / "training.pt")), path / "training.pt")
    args = [*SIZES, "--data", corpus, "--steps", 6, "--out", tmp_path / "run"]
    result = refused(gdn, f"gdn: --out: expected a whole checkpoint in {path}, got training.pt with ", *args)
    assert told in result.err.splitlines()[-1]


def test_a_log_ends_where_it_is_damaged(gdn, trained, corpus, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with open(run / "train.jsonl", "ab") as file:
        file.write(b'{"step": 7, "\xff\xfe')
    assert losses(run) == losses(trained)
    result = gdn("train", *SIZES, "--data", corpus, "--steps", 6, "--out", run)
    assert result.code == 0 and (run / "train.jsonl").read_bytes() == (trained / "train.jsonl").read_bytes()


def test_a_loss_that_is_no_number_ends_the_run(gdn, corpus, tmp_path, monkeypatch):
    advance = training.loss_function

    def broken(model):
        inner, count = advance(model), [0]

        def loss_of(ids):
            count[0] += 1
            return inner(ids) * (math.nan if count[0] == 3 else 1.0)

        return loss_of

    monkeypatch.setattr(training, "loss_function", broken)
    args = [*SIZES, "--eval-batches", 0, "--data", corpus, "--steps", 6, "--save-every", 1]
    result = gdn("train", *args, "--out", tmp_path / "run")
    assert result.code == 1 and "step 3: expected a finite loss and gradient, got loss nan" in result.err
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002" and len(losses(tmp_path / "run")) == 2


def test_learning_rate_schedule():
    recipe = training.Recipe({}, "", 100, 1, 1, 2, 1.0, 10, 0.0, 0.0, 0, "float32", 0.0)
    rates = [training.learning_rate(recipe, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)


def test_biases_norms_and_gates_are_not_decayed(trained):
    recipe = training.Recipe({}, "", 1, 1, 1, 2, 1.0, 0, 0.25, 0.0, 0, "float32", 0.0)
    model = HybridLM.from_pretrained(trained)
    decayed, kept = training.make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept_names = {names[id(p)].split(".")[-1] for p in kept["params"]}
    assert {"A_log", "dt_bias"} <= kept_names and all(p.dim() >= 2 for p in decayed["params"])
    assert len(names) == len(decayed["params"]) + len(kept["params"])


def test_what_a_killed_process_left_does_not_bar_the_folder(gdn, corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".train.json.4242").write_text("{")
    assert gdn("train", *SIZES, "--steps", 1, "--data", corpus, "--out", out).code == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".train")]


def test_names_of_files_that_are_not_utf8(gdn, corpus, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(corpus, folder)
    (folder / os.fsdecode(b"n\xe9.txt")).write_text("some more text " * 50)
    assert gdn("train", *SIZES, "--steps", 1, "--data", folder, "--out", tmp_path / "run").code == 0
