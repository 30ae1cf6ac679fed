"""Data parallel training: replicated (DDP) and sharded (FSDP2), as it is and compiled, gives one process's losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two])]


@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_those_of_one_process(device):
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **hidden}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.compile.data_parallel"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert results.pop("same text") and results.pop("saved")
    want = results.pop("one process")
    assert want[0] - want[-1] > 0.05 and len(results) == 6
    for name, losses in results.items():
        assert losses == pytest.approx(want, rel=5e-3 if "bf16" in name else 1e-5), name
