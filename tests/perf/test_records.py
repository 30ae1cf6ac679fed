"""The CSV: its columns, what a row says, continuing a file, figures from elsewhere."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from perf.measure import Ceilings, Floor, Measurement, Quantiles
from perf.records import PUBLISHED, ROOT, Environment, Recorder, Row, make_row, published, read_csv
from perf.report import summary
from perf.shapes import DIRECTIONS, DTYPES, Cost, Shape

ENVIRONMENT = Environment(
    "2026-01-01T00:00:00Z", "abc", "a device", "1.0", "2.11.0", "3.6.0", "0.6.0", "", "", "", "", "", 4300.0, 750.0
)
SHAPE = Shape(16, 32, 1, 8192)


TIMES = Quantiles(0.9, 1.0, 1.1, 0.8, 50)


def row(provider="gdn_ops", times=TIMES, note=""):
    return make_row(
        SHAPE, "forward", "bf16", Measurement(provider, times, "cuda graph", note), Cost(10**9, 10**12),
        Floor(0.25, 0.5), Ceilings(4e12, 2e15), error=1e-3 if provider != "gdn_ops" else None,
    )  # fmt: skip


def test_a_row_in_numbers():
    """1 ms for a gigabyte is 1 TB/s of 4; for a teraflop, 1 PFLOP/s of 2."""
    got = row()
    assert (got.ratio, got.of_copy, got.of_matmul) == pytest.approx((2.0, 0.25, 0.5))
    assert (got.p20_ms, got.p50_ms, got.p80_ms, got.least_ms, got.samples) == (0.9, 1.0, 1.1, 0.8, 50)
    assert got.shape == SHAPE and got.floor_ms == 0.5


def test_written_is_read(tmp_path):
    path = tmp_path / "new" / "gpu.csv"
    recorder = Recorder(path, ENVIRONMENT)
    recorder.add(row())
    (line,) = read_csv([path])  # on disk as soon as it is added
    recorder.add(row("FLA", None, 'RuntimeError: "raised", with a comma'))
    Recorder(path, ENVIRONMENT).add(row())
    lines = read_csv([path])
    assert len(lines) == 3 and lines[0] == line
    assert list(line) == [f.name for f in (*dataclasses.fields(Row), *dataclasses.fields(Environment))]
    assert line["p50_ms"] == "1.0" and line["device"] == "a device" and line["torch"] == "2.11.0"
    assert lines[1]["p50_ms"] == "" and lines[1]["note"] == 'RuntimeError: "raised", with a comma'


def test_another_files_columns_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected columns .* got .*'a', 'b'.*name another file"):
        Recorder(path, ENVIRONMENT)
    assert path.read_text() == "a,b\n1,2\n"


def test_published_figures_are_whole():
    lines = read_csv([PUBLISHED])
    for line in lines:
        assert line["direction"] in DIRECTIONS and line["dtype"] in DTYPES
        assert float(line["ms"]) > 0 and line["source"] and line["gpu"] and line["provider"]
    keys = [tuple(v for n, v in line.items() if n not in ("ms", "source", "version")) for line in lines]
    assert len(set(keys)) == len(keys)
    assert {line["provider"]: float(line["ms"]) for line in published("backward", SHAPE, "bf16")} == {
        "FlashQLA": 0.789,
        "FLA": 1.444,
    }


def test_summary_compares_within_and_beyond_the_run():
    text = summary(
        [row(), row("FLA", Quantiles(1.9, 2.0, 2.1, 1.8, 50)), row("other", None, "broken")], ENVIRONMENT, "gdn_ops"
    )
    fla = next(line for line in text.splitlines() if " FLA " in line)
    assert fla.split()[-2:] == ["2.00", "1.0e-03"]
    assert "16/32 1x8192 forward other: broken" in text
    assert "gdn_ops 1 ms is 2.01 x FLA 0.6.0 0.497 ms on NVIDIA H200" in text


def test_summary_says_what_the_memory_is_of():
    forward, backward = (
        dataclasses.replace(row(), peak_mib=13.2),
        dataclasses.replace(row(), direction="backward", peak_mib=520.0),
    )
    text = summary([forward, backward], ENVIRONMENT, "gdn_ops")
    assert "peak memory of forward alone beyond the inputs: 16/32 1x8192: gdn_ops 13 MiB\n" in text
    assert "peak memory of forward and backward beyond the inputs: 16/32 1x8192: gdn_ops 520 MiB" in text


def test_committed_results_have_todays_columns_and_no_paths():
    paths = [ROOT / "perf" / "results" / f"{name}.csv" for name in ("cpu", "gpu", "linear", "long", "op")]
    assert paths[0].exists()
    for path in filter(Path.exists, paths):
        with path.open(newline="") as file:
            columns, *lines = csv.reader(file)
        assert columns == [f.name for f in (*dataclasses.fields(Row), *dataclasses.fields(Environment))], path
        assert lines and all(len(line) == len(columns) for line in lines), path
        for line in lines:
            cells = dict(zip(columns, line))
            assert cells["device"] and cells["torch"] and float(cells["floor_ms"]) > 0
            assert not any(folder in cells["note"] for folder in ("/home/", "/tmp/", "/root/", "/usr/")), path
