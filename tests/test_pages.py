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


def test_every_row_of_the_matrix_names_a_test_or_says_not_yet():
    section = (ROOT / "README.md").read_text().split("## What works where")[1].split("\n## ")[0]
    rows = [line.split("|")[2:-1] for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    for row in rows:
        text = " ".join(row)
        assert "](tests/" in text or "not yet" in text, row


def _significant(x: str, digits: int = 3) -> float:
    return float(f"{float(x):.{digits}g}")


@pytest.mark.parametrize(
    "name, providers",
    [("gpu", ["gdn_ops"]), ("long", ["gdn_ops"]), ("cpu", ["gdn_ops", "gdn_ops chunk", "transformers"])],
)
def test_figures_are_the_recorded_ones(name, providers):
    """Every median of ``providers`` in the CSV stands in docs/performance.md."""
    page = (ROOT / "docs" / "performance.md").read_text()
    with open(ROOT / "perf" / "results" / f"{name}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] in providers and row["p50_ms"]]
    shown = {float(x) for x in re.findall(r"\| (\d[\d.]*) ", page)}
    skipped = ("forward+backward",) if name == "gpu" else ()
    missing = [row for row in rows if _significant(row["p50_ms"]) not in shown and row["direction"] not in skipped]
    assert rows and not missing
