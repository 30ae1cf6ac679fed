"""The script for compute-sanitizer, run on the CPU: its calls are right, and it ends with an error where it should."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import sanitize


def test_everything_runs_and_is_named(capsys):
    sanitize.main(["--device", "cpu"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(sanitize.jobs())


def test_a_result_that_is_not_finite_ends_it(monkeypatch):
    monkeypatch.setattr(sanitize, "pools", lambda device: [torch.ones(1), torch.tensor(float("nan"))])
    with pytest.raises(SystemExit, match=r"pools: expected finite results, got others in \[1\]"):
        sanitize.main(["--device", "cpu", "--only", "pools"])
