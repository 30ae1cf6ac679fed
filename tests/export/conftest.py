"""Exports that several tests look at; each takes some seconds, so each is made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gdn_ops.export import export_aoti

from tests.export import modules


@pytest.fixture(scope="session")
def mixer(tmp_path_factory):
    model = modules.Mixer()
    out_dir = tmp_path_factory.mktemp("mixer") / "out"
    return model, export_aoti(model, out_dir, modules.mixer_inputs(3, 70), modules.mixer_shapes())


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    model = modules.Packed()
    inputs = modules.packed_inputs([0, 9, 9, 40])
    return model, export_aoti(model, tmp_path_factory.mktemp("packed") / "out", inputs, modules.packed_shapes())


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def language_model(request, tmp_path_factory):
    """A tiny hybrid model and its export."""
    from gdn_ops.models import HybridConfig, HybridLM

    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny")).to(request.param)
    return model, export_aoti(model, tmp_path_factory.mktemp("hybrid") / "out")


@pytest.fixture
def run_alone(tmp_path):
    """Runs ``[(package, args, kwargs), ...]`` in a fresh process without gdn_ops."""

    def run(calls: list[tuple]) -> list:
        torch.save([(str(package), args, kwargs) for package, args, kwargs in calls], tmp_path / "calls.pt")
        script = Path(__file__).with_name("alone.py")
        results = tmp_path / "results.pt"
        command = [sys.executable, "-I", "-X", "faulthandler", str(script), str(tmp_path / "calls.pt"), str(results)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"exit {done.returncode}, results saved: {results.exists()}\n{done.stderr}"
        return torch.load(results)

    return run
