"""Whole steps of training: forward, loss, backward, clipping and fused AdamW, of models that a preset names.

Every provider starts from the same weights and the same tokens, and takes its turn in every round. A step is that of
``gdn train``: fp32 weights with bf16 autocast on CUDA, unless ``precision`` says otherwise for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.models import HybridConfig, HybridLM
from gdn_ops.nn import GatedDeltaNet, Mamba2, SlidingWindowAttention
from perf.clocks import EventClock, WallClock
from perf.linear_providers import cost as linear_cost
from perf.measure import Candidate, Ceilings, Measurement, describe, interleave, measure_ceilings
from perf.providers import OURS, Unavailable
from perf.records import Recorder, environment, short
from perf.report import layout
from perf.shapes import Shape, cost
from perf.training_models import TrainProvider, missing

PRESETS = ("gdn-0.4b", "h1-0.4b")
PRECISIONS = ("autocast", "bf16", "fp32")
# Dense bf16 products of the tensor cores by the makers' data sheets, TFLOP/s; the first name that fits counts.
NOMINAL = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200": 989.4, "B200": 2250.0, "A100": 312.0}


class Size(NamedTuple):
    """``batch`` sequences of ``T`` tokens."""

    T: int
    batch: int

    def __str__(self) -> str:
        return f"{self.T}x{self.batch}"


# Of the paper's figure 3; the first is the one to look at.
SIZES = (Size(4096, 8), Size(2048, 16), Size(8192, 4), Size(16384, 2), Size(32768, 1))


class Setting(NamedTuple):
    """What all providers of a run have in common."""

    device: str
    precision: str
    checkpointing: str = "none"


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """One provider at one size. Times in milliseconds a step; ``tflop`` is :func:`model_flops`, in 1e12;
    ``mfu`` is it over p50 and the measured rate of a bf16 product, ``mfu_nominal`` over the data sheet's;
    ``peak_gib`` is memory of the step with weights and optimizer; ``loss`` is the first step's, ``loss_error`` its
    relative difference from ours; ``first_s`` how long the first step took, compilation included."""

    preset: str
    T: int
    batch: int
    precision: str
    checkpointing: str
    provider: str
    method: str
    samples: int
    parameters: int
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    least_ms: float | None
    tokens_per_s: float | None
    tflop: float
    mfu: float | None
    mfu_nominal: float | None
    peak_gib: float | None
    loss: float | None
    loss_error: float | None
    first_s: float | None
    note: str


def parse_size(text: str) -> Size:
    """``"4096x8"``: tokens a sequence, sequences; raises ValueError naming what is wrong."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape: expected TxBATCH, two positive integers, got {text!r}")
    return Size(*map(int, parts))


def model_flops(model: HybridLM, size: Size) -> int:
    """Of one step, whatever is computed again not counted: ``6 * parameters * tokens`` (an untied embedding, which is
    looked up, left out), and three times the forward products of the mixers without weights: the chunk form of the
    rules (C=64, as ``perf.shapes.cost``) and the pairs of query and key that attention sees."""
    T, batch = size
    weights = model.num_parameters() - (0 if model.lm_head is None else model.embedding.weight.numel())
    return 6 * weights * T * batch + 3 * sum(_products(block.mixer, T, batch) for block in model.layers)


def _products(mixer: nn.Module, T: int, batch: int) -> int:
    if isinstance(mixer, GatedDeltaNet):
        shape = Shape(mixer.num_heads, mixer.num_v_heads, batch, T, mixer.head_k_dim, mixer.head_v_dim)
        return (cost if mixer.use_delta else linear_cost)(shape, "forward", torch.bfloat16).flops
    if isinstance(mixer, Mamba2):
        shape = Shape(mixer.n_groups, mixer.num_heads, batch, T, mixer.state_size, mixer.head_dim)
        return linear_cost(shape, "forward", torch.bfloat16).flops
    if isinstance(mixer, SlidingWindowAttention):
        W = min(T, mixer.window)
        pairs = W * (W + 1) // 2 + (T - W) * W
        return 4 * batch * mixer.num_heads * mixer.head_dim * pairs
    raise TypeError(f"mixer: expected one of gdn_ops.nn, got {type(mixer).__name__}")


def nominal_peak(device: str) -> float | None:
    """FLOPs a second by the data sheet of the card of that name; None for others."""
    return next((peak * 1e12 for name, peak in NOMINAL.items() if name in device), None)


class Step:
    """One step of training a model on batches of ``ids [2, B, T]`` in turns; the loss of the first is kept."""

    def __init__(self, model: nn.Module, loss_of: Callable[[Tensor], Tensor], ids: Tensor, setting: Setting) -> None:
        matrices, others = [], []
        for name, p in model.named_parameters():
            (matrices if p.dim() == 2 and "conv" not in name else others).append(p)
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95), fused=True)
        self.parameters = matrices + others
        self.loss_of, self.batches, self.setting, self.first = loss_of, itertools.cycle(ids), setting, None

    def __call__(self) -> None:
        low = torch.autocast(self.setting.device, torch.bfloat16)
        with low if self.setting.precision == "autocast" else contextlib.nullcontext():
            loss = self.loss_of(next(self.batches))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.first = loss.detach() if self.first is None else self.first


@dataclasses.dataclass
class Entry:
    """A provider that has taken its first step, or what went wrong."""

    name: str
    note: str = ""
    step: Step | None = None
    parameters: int = 0
    loss: float | None = None
    first_s: float | None = None
    peak_gib: float | None = None


def make_model(config: HybridConfig, setting: Setting) -> HybridLM:
    """Of seed 0, to be trained."""
    torch.manual_seed(0)
    return HybridLM(config).to(torch.bfloat16 if setting.precision == "bf16" else torch.float32).train()


def enter(provider: TrainProvider, config: HybridConfig, ids: Tensor, setting: Setting) -> Entry | None:
    """Builds, takes the first step, and measures the memory of the second: weights, optimizer and what the step adds,
    not what others have on the device. None of what ``provider`` has not."""
    entry, device = Entry(provider.name), setting.device
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        with torch.device(device):  # where weights are drawn in no time
            trained = provider.build(make_model(config, setting), setting.checkpointing)
        entry.note, entry.parameters = trained.note, sum(p.numel() for p in trained.model.parameters())
        step, start = Step(trained.model, trained.loss_of, ids, setting), time.perf_counter()
        step()
        entry.loss = step.first.item()
        entry.first_s = time.perf_counter() - start
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            entry.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        entry.step = step
    except Unavailable as error:
        print(f"left out: {provider.name}: {error}")
        return None
    except Exception as error:  # a peer that fails must not end the run; its row says why
        entry.note = "; ".join(filter(None, (describe(error), entry.note)))
    return entry


def measure_size(
    preset: str, config: HybridConfig, size: Size, who: Sequence[TrainProvider], setting: Setting, seconds: float,
    recorder: Recorder, ceilings: Ceilings, deadline: float,
) -> list[TrainRow]:  # fmt: skip
    """One size for every provider; adds the rows to ``recorder`` and returns them. Providers that have not begun at
    ``deadline`` (seconds of ``time.perf_counter``) are named and left out, but for the first."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, size.batch, size.T), generator=generator).to(setting.device)
    with torch.device("meta"):
        flops = model_flops(HybridLM(config), size)
    entries = []
    for provider in who:
        if entries and time.perf_counter() > deadline:
            print(f"not measured, the budget is spent: {preset} {size} {provider.name}")
            continue
        entry = enter(provider, config, ids, setting)
        entries += [] if entry is None else [entry]
        gc.collect()  # of one that failed
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    candidates = [Candidate(e.name, [e.step]) for e in entries if e.step is not None]
    cuda = setting.device == "cuda"
    measured = interleave(candidates, [EventClock() if cuda else WallClock()], seconds, most=30, warm=1 if cuda else 0)
    times = {m.provider: m for m in measured}
    ours = next((e.loss for e in entries if e.name == OURS), None)
    rows = [
        _row(preset, size, setting, e, times.get(e.name), flops, ours, ceilings, recorder.env.device) for e in entries
    ]
    for row in rows:
        recorder.add(row)
    return rows


def _row(
    preset: str, size: Size, setting: Setting, entry: Entry, m: Measurement | None, flops: int, ours: float | None,
    ceilings: Ceilings, device: str,
) -> TrainRow:  # fmt: skip
    t, peak = None if m is None else m.times, nominal_peak(device)
    rate = None if t is None else 1e3 / t.p50
    error = None if None in (ours, entry.loss) or entry.name == OURS else abs(entry.loss - ours) / ours
    return TrainRow(
        preset, *size, setting.precision, setting.checkpointing, entry.name, "" if m is None else m.method,
        0 if t is None else t.samples, entry.parameters, *((None,) * 4 if t is None else map(short, t[:4])),
        None if rate is None else short(size.T * size.batch * rate), short(flops / 1e12),
        None if rate is None else short(flops * rate / ceilings.matmul),
        None if rate is None or peak is None else short(flops * rate / peak),
        short(entry.peak_gib), short(entry.loss), short(error), short(entry.first_s),
        "; ".join(filter(None, (entry.note, "" if m is None else m.note))),
    )  # fmt: skip


def run(
    presets: Sequence[str], sizes: Sequence[Size], who: Sequence[TrainProvider], setting: Setting, csv: Path,
    budget: float,
) -> list[TrainRow]:  # fmt: skip
    """Measures each size of each preset within ``budget`` seconds (compilation included) and prints what came out.

    Providers that are not installed are named first; what the budget leaves no time for is named at the end.
    """
    start = time.perf_counter()
    reasons = {provider.name: missing(provider) for provider in who}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"absent: {name}: {reason}")
    who = [provider for provider in who if reasons[provider.name] is None]
    low = setting.precision != "fp32"
    ceilings = measure_ceilings(setting.device, torch.bfloat16 if low else torch.float32)
    recorder, skipped = Recorder(csv, environment(setting.device, ceilings), TrainRow), []
    tasks = [(preset, size) for size in sizes for preset in presets]
    for i, (preset, size) in enumerate(tasks):
        left = budget - (time.perf_counter() - start)
        if left <= 0:
            skipped.append((preset, size))
            continue
        config = HybridConfig.preset(preset)
        # Most of a size's share goes to compiling and tuning.
        seconds = min(10.0, 0.25 * left / (len(tasks) - i))
        for row in measure_size(preset, config, size, who, setting, seconds, recorder, ceilings, start + budget):
            shown = "-" if row.p50_ms is None else f"{row.p50_ms:.4g} ms, {row.tokens_per_s:,.0f} tokens/s"
            print(f"{preset} {size} {row.provider}: {shown} {row.note}".rstrip(), flush=True)
    print("\n" + summary(recorder.rows))
    for preset, size in skipped:
        print(f"not measured, the budget of {budget:g} s was spent: {preset} {size}")
    print(f"\n{len(recorder.rows)} rows in {csv}, {time.perf_counter() - start:.0f} s")
    return recorder.rows


COLUMNS = ("model", "T x batch", "provider", "ms", "tokens/s", "to ours", "MFU", "nominal", "GiB", "loss", "first, s")


def summary(rows: Sequence[TrainRow]) -> str:
    """A line a row; ``to ours`` is tokens/s over gdn_ops' at the same size."""
    own = {(r.preset, r.T, r.batch): r.tokens_per_s for r in rows if r.provider == OURS}

    def cells(r: TrainRow) -> list[str]:
        ours = own.get((r.preset, r.T, r.batch))
        ratio = None if None in (ours, r.tokens_per_s) else r.tokens_per_s / ours
        numbers = (
            (r.p50_ms, "{:.4g}"), (r.tokens_per_s, "{:,.0f}"), (ratio, "{:.2f}"), (r.mfu, "{:.1%}"),
            (r.mfu_nominal, "{:.1%}"), (r.peak_gib, "{:.1f}"), (r.loss, "{:.4f}"), (r.first_s, "{:.0f}"),
        )  # fmt: skip
        return [r.preset, str(Size(r.T, r.batch)), r.provider, *("-" if x is None else f.format(x) for x, f in numbers)]

    notes = [f"{r.preset} {r.T}x{r.batch} {r.provider}: {r.note}" for r in rows if r.note]
    table = layout([COLUMNS, *map(cells, rows)])
    return table + ("\n\nnotes\n  " + "\n  ".join(notes) if notes else "")
