"""The pages say what is there: their links lead somewhere, and their figures are those of the committed CSV files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_cell_of_the_matrix_names_a_test():
    """Or says by a dash that there is none."""
    section = (ROOT / "README.md").read_text().split("## What works where")[1].split("\n## ")[0]
    rows = [line.split("|")[2:-1] for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    for row in rows:
        for cell in map(str.strip, row):
            assert "](tests/" in cell or cell.startswith(("-", "the same file")), row


def tables(page: str) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of every table."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", (ROOT / "docs" / page).read_text(), re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n ").split("|")] for line in block.splitlines())
        found.append((head, rows))
    return found


def table(*heads: str) -> tuple[list[str], dict[str, list[str]]]:
    """The one table of docs/performance.md that has all these columns: its head, and rows by their first cells."""
    ((head, rows),) = ((head, rows) for head, rows in tables("performance.md") if set(heads) <= set(head))
    return head, {row[0]: row for row in rows}


def recorded(name: str, *providers: str) -> list[dict[str, str]]:
    with open(ROOT / "perf" / "results" / f"{name}.csv") as file:
        return [row for row in csv.DictReader(file) if row["provider"] in providers and row["p50_ms"]]


def median(row: dict[str, str]) -> float:
    return float(f"{float(row['p50_ms']):.3g}")


@pytest.mark.parametrize(
    "direction, mark",
    [
        ("forward", "FlashInfer, same run"), ("backward", "peak"), ("decode", "in place"),
        ("decode, bf16 state", "of the copy's rate"),
    ],
)  # fmt: skip
def test_gpu_figures_are_the_recorded_ones(direction, mark):
    """Every median of ours, and of FlashInfer, in its row and column."""
    head, shown = table("H200", "times the floor", mark)
    checked = set()
    for row in recorded("gpu", "gdn_ops", "gdn_ops in place", "FlashInfer"):
        column = re.search("H[12]00", row["device"])[0]
        if row["direction"] != direction or column not in head:
            continue
        place = head.index(column)
        if row["provider"] == "FlashInfer":
            place = head.index("FlashInfer, same run")
        elif row["provider"] == "gdn_ops in place" and "in place" in head:
            place = head.index("in place", place)
        label = f"{row['H']}/{row['HV']} {row['N']}x{row['T']}"
        assert float(shown[label][place]) == median(row), (label, head[place])
        checked.add((label, place))
    wanted = [i for i, name in enumerate(head) if name in ("H200", "H100", "in place", "FlashInfer, same run")]
    assert checked == {(label, place) for label in shown for place in wanted}


def test_cpu_figures_are_the_recorded_ones():
    head, rows = next((head, rows) for head, rows in tables("performance.md") if head[:2] == ["T", "direction"])
    shown = {(row[0], row[1], name): cell for row in rows for name, cell in zip(head[2:], row[2:])}
    want = {(row["T"], row["direction"], row["provider"]): median(row) for row in recorded("cpu", *head[2:])}
    assert {key: float(cell) for key, cell in shown.items() if cell != "-"} == want


def test_long_figures_are_the_recorded_ones():
    rows = next(rows for head, rows in tables("performance.md") if head[:2] == ["T", "ms"])
    want = {row["T"]: median(row) for row in recorded("long", "gdn_ops")}
    assert {row[0].replace(",", ""): float(row[1]) for row in rows} == want
