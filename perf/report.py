"""The table at the end of a run, and the lines beside it that compare with figures from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from perf.records import Environment, Row, published

COLUMNS = (
    "shape",
    "direction",
    "provider",
    "p20",
    "p50",
    "p80",
    "floor",
    "p50/floor",
    "copy",
    "matmul",
    "to ours",
    "error",
)


def _number(x: float | None, form: str = "{:.4g}") -> str:
    return "-" if x is None else form.format(x)


def _cells(row: Row, ours: Row | None) -> list[str]:
    percent = "{:.0%}"
    to_ours = None if ours is None or None in (ours.p50_ms, row.p50_ms) else row.p50_ms / ours.p50_ms
    return [
        str(row.shape), row.direction, row.provider, *map(_number, (row.p20_ms, row.p50_ms, row.p80_ms, row.floor_ms)),
        _number(row.ratio, "{:.2f}"), _number(row.of_copy, percent), _number(row.of_matmul, percent),
        _number(to_ours, "{:.2f}"), _number(row.error, "{:.1e}"),
    ]  # fmt: skip


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right, the first three to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def against_published(row: Row) -> list[str]:
    """``row`` next to each figure from elsewhere: a ratio below 1 means that ours takes less time."""
    if row.p50_ms is None:
        return []
    return [
        f"{row.shape} {row.direction}: {row.provider} {row.p50_ms:.4g} ms is {row.p50_ms / float(line['ms']):.2f} x "
        f"{line['provider']} {line['version']}".rstrip()
        + f" {float(line['ms']):.4g} ms "
        f"on {line['gpu']}, {line['source']}"
        for line in published(row.direction, row.shape, row.dtype)
    ]


def summary(rows: Sequence[Row], env: Environment, ours: str, compare: bool = True) -> str:
    """The run as text: where, the ceilings, a line a row, notes, and (``compare``) ratios to figures from elsewhere."""
    own = {(r.shape, r.direction): r for r in rows if r.provider == ours}
    parts = [
        f"{env.device}; torch {env.torch}, triton {env.triton or 'absent'}; commit {env.commit or 'unknown'}; "
        f"copy {env.copy_gb_s:.0f} GB/s, matmul {env.matmul_tflop_s:.4g} TFLOP/s (measured in this run)",
        "milliseconds a call; floor: the larger of bytes over the copy rate and products over the matmul rate; "
        "copy, matmul: p50 as a fraction of those rates; to ours: p50 over gdn_ops' in the same rounds; "
        "error: difference from gdn_ops",
        layout([COLUMNS, *(_cells(r, own.get((r.shape, r.direction))) for r in rows)]),
    ]
    for what, alone in (("forward alone", True), ("forward and backward", False)):
        chosen = [r for r in rows if r.peak_mib is not None and (r.direction == "forward") == alone]
        peaks = [f"{r.shape}: {r.provider} {r.peak_mib:.0f} MiB" for r in chosen]
        if peaks:
            parts.append(f"peak memory of {what} beyond the inputs: " + "; ".join(peaks))
    notes = [f"{r.shape} {r.direction} {r.provider}: {r.note}" for r in rows if r.note]
    elsewhere = [line for r in rows if compare and r.provider == ours for line in against_published(r)]
    if notes:
        parts.append("notes\n  " + "\n  ".join(notes))
    if elsewhere:
        parts.append("against figures not taken in this run (not interleaved, another machine)\n  ")
        parts[-1] += "\n  ".join(elsewhere)
    return "\n\n".join(parts)
