"""What a call is made of (``python -m perf kernels``)."""

from __future__ import annotations

import pytest
import torch

from perf.__main__ import main
from perf.kernels import KernelRow, profile, rows_of, table
from perf.records import read_csv


def test_times_by_operator_and_shares():
    x = torch.randn(64, 64)
    times = profile(lambda: (x @ x).exp_().exp_(), "cpu", calls=3)
    rows = {row.kernel: row for row in rows_of("x", "y", times, calls=3)}
    assert (rows["aten::mm"].starts, rows["aten::exp_"].starts) == (1, 2)
    assert sum(row.share for row in rows.values()) == pytest.approx(1, abs=1e-3)
    assert all(row.p50_us >= 0 for row in rows.values())


def test_the_longest_stand_first():
    rows = rows_of("x", "y", {"short": [1.0, 1.0], "long": [3.0, 5.0, 4.0, 4.0]}, calls=2)
    assert rows == [KernelRow("x", "y", "long", 2.0, 4.0, 0.88889), KernelRow("x", "y", "short", 1.0, 1.0, 0.11111)]
    text = table(rows, 1).splitlines()
    assert len(text) == 2 and text[1].split() == ["long", "2", "4.0", "8.0", "88.9%"]


def test_operators_and_a_training_step_from_the_command_line(tmp_path, capsys):
    main(["kernels", "--device", "cpu", "--out", str(tmp_path), "--shape", "1,2,1,70,16,16", "--direction", "forward"])
    step = ["--preset", "tiny", "--size", "32x2", "--layers", "1", "--provider", "gdn_ops eager"]
    main(["kernels", "--device", "cpu", "--out", str(tmp_path), *step])
    said = capsys.readouterr().out
    lines = read_csv([tmp_path / "kernels.csv"])
    assert {line["what"] for line in lines} == {"1/2 1x70 K=16 V=16 forward fp32", "tiny 1 layers 32x2 fp32"}
    assert all(line["device"] and line["torch"] for line in lines)
    for line in {line["what"]: line for line in lines}.values():
        assert line["what"] in said and line["kernel"]
    assert any("adamw" in line["kernel"] for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "shape, preset: expected at least one"),
        (["--preset", "tiny", "--layers", "0", "--size", "32x2"], "num_hidden_layers"),
        (["--preset", "tiny", "--size", "32"], "shape: expected TxBATCH"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["kernels", "--device", "cpu", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
