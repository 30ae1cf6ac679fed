"""Rows of the CSV: one a provider, shape and direction, with everything needed to read it a year later."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from perf.measure import Ceilings, Floor, Measurement
from perf.shapes import Cost, Shape

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).with_name("published.csv")
PEERS = {
    "fla": "flash-linear-attention", "flash_qla": "flash-qla", "flashinfer": "flashinfer-python",
    "mamba_ssm": "mamba-ssm", "transformers": "transformers", "onnxruntime": "onnxruntime",
}  # fmt: skip


def version_of(distribution: str) -> str:
    """Of an installed distribution, else an empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else ""


def cpu_name() -> str:
    """The processor's own name for itself, and how many threads torch uses of it."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where a run took place; the same for all of its rows."""

    time: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    fla: str
    flash_qla: str
    flashinfer: str
    mamba_ssm: str
    transformers: str
    onnxruntime: str
    copy_gb_s: float
    matmul_tflop_s: float


def environment(device: str, ceilings: Ceilings) -> Environment:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    cuda = device == "cuda"
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else ""
    return Environment(
        time=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit,
        device=torch.cuda.get_device_name() if cuda else cpu_name(),
        driver=driver,
        torch=torch.__version__,
        triton=version_of("triton"),
        **{field: version_of(distribution) for field, distribution in PEERS.items()},
        copy_gb_s=round(ceilings.copy / 1e9, 1),
        matmul_tflop_s=round(ceilings.matmul / 1e12, 3),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Times in milliseconds a call; ``ratio`` is p50 over the floor (1 is perfect);
    ``of_copy`` and ``of_matmul`` are the fractions of the measured ceilings that p50 amounts to; ``error`` is the
    relative RMS difference of the result from gdn_ops' own; ``peak_mib`` is memory beyond the inputs: of the call in
    ``forward``, else of forward and backward."""

    direction: str
    H: int
    HV: int
    N: int
    T: int
    K: int
    V: int
    dtype: str
    provider: str
    method: str
    samples: int
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    least_ms: float | None
    floor_ms: float
    floor_bytes_ms: float
    floor_flops_ms: float
    ratio: float | None
    of_copy: float | None
    of_matmul: float | None
    error: float | None
    peak_mib: float | None
    note: str

    @property
    def shape(self) -> Shape:
        return Shape(self.H, self.HV, self.N, self.T, self.K, self.V)


def short(x: float | None) -> float | None:
    """Five significant digits."""
    return None if x is None else float(f"{x:.5g}")


def make_row(
    shape: Shape, direction: str, dtype: str, measurement: Measurement, cost: Cost, floor: Floor, ceilings: Ceilings,
    error: float | None = None, peak_mib: float | None = None,
) -> Row:  # fmt: skip
    t = measurement.times
    seconds = None if t is None else t.p50 * 1e-3
    return Row(
        direction, *shape, dtype, measurement.provider, measurement.method, 0 if t is None else t.samples,
        *((None,) * 4 if t is None else map(short, t[:4])),
        short(floor.ms), short(floor.bytes_ms), short(floor.flops_ms),
        *((None,) * 3 if seconds is None else map(short, (
            t.p50 / floor.ms, cost.bytes / seconds / ceilings.copy, cost.flops / seconds / ceilings.matmul,
        ))),
        short(error), short(peak_mib), measurement.note,
    )  # fmt: skip


class Recorder:
    """Appends rows to a CSV file as they come, each flushed: a run that is cut off loses nothing it has measured.

    ``kind`` is the dataclass of the rows. An existing file is continued if its columns are these; otherwise ValueError
    says so.
    """

    def __init__(self, path: Path, env: Environment, kind: type = Row):
        self.path, self.env, self.rows = path, env, []
        self.columns = [f.name for f in dataclasses.fields(kind)] + [f.name for f in dataclasses.fields(Environment)]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                found = next(csv.reader(file))
            if found != self.columns:
                raise ValueError(f"{path}: expected columns {self.columns}, got {found}; name another file")
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(self.columns)

    def add(self, row) -> None:
        self.rows.append(row)
        values = {**dataclasses.asdict(row), **dataclasses.asdict(self.env)}
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(["" if values[c] is None else values[c] for c in self.columns])


def read_csv(paths: Iterable[Path]) -> list[dict[str, str]]:
    """All lines of the files, as text by column."""
    lines = []
    for path in paths:
        with Path(path).open(newline="") as file:
            lines += csv.DictReader(file)
    return lines


def published(direction: str, shape: Shape, dtype: str) -> list[dict[str, str]]:
    """Figures of others for this row from ``published.csv``; its ``source`` column says where each was taken."""
    wanted = {"direction": direction, "dtype": dtype, **{n: str(v) for n, v in shape._asdict().items()}}
    return [line for line in read_csv([PUBLISHED]) if all(line[n] == v for n, v in wanted.items())]
