"""Whether an exported program gives the eager model's numbers: the report every export writes, and its tolerance.

Error = RMS(x - eager) / RMS(eager) of each result; integer results must be equal. A whole model compounds the
roundings of its layers, and a compiler that fuses keeps intermediate values in fp32 that eager rounds to 16 bits, so
the tolerances are wider than an operator's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from gdn_ops.export.manifest import user_tensors, writes
from gdn_ops.export.program import Plan, inference
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
CHUNK = 64
LENGTHS = {"T=1": 1, "T=C-1": CHUNK - 1, "T=C": CHUNK, "T=C+1": CHUNK + 1, "ragged": 2 * CHUNK + 9}
# Parameters beyond which a language model is run over half the tokens: each case then costs it seconds.
LARGE = 2**27
# Of a language model, traced with two rows: a length, its rows, and whether they go on from the case before.
CASES = [(case, rows, goes_on) for case, rows in zip(LENGTHS, (1, 3, 1, 3, 1)) for goes_on in (False, True)]
LARGE_CASES = [
    ("T=1", 3, False),
    ("T=C-1", 1, True),
    ("T=C", 1, True),
    ("T=C+1", 1, False),
    ("ragged", 1, True),
]
DECODED = ("T=1", "T=C+1")
# Numbers whose squares are summed up in fp32, which is exact to six digits; the sums are added in fp64.
SUMMED = 4096


class ParityError(RuntimeError):
    """An exported program does not give the eager model's numbers."""


def working_dtype(model: nn.Module, inputs: Any = ()) -> torch.dtype:
    """The least precise floating dtype of the parameters and inputs; it sets the tolerance."""
    tensors = [*model.parameters(), *(x for x in pytree.tree_leaves(inputs) if torch.is_tensor(x))]
    found = {x.dtype for x in tensors if x.is_floating_point()} or {torch.float32}
    unknown = found - TOLERANCE.keys()
    if unknown:
        raise TypeError(f"model: expected dtypes {', '.join(map(str, TOLERANCE))}, got {', '.join(map(str, unknown))}")
    return max(found, key=TOLERANCE.__getitem__)


def error(result: Tensor, eager: Tensor) -> float:
    """RMS error relative to ``eager``; infinity for another shape, dtype, for unequal integers and where only one is
    NaN or infinite. Where both are, alike, there is nothing to compare."""
    if result.shape != eager.shape or result.dtype != eager.dtype:
        return math.inf
    if not eager.is_floating_point():
        return 0.0 if torch.equal(result, eager) else math.inf
    if torch.equal(result, eager):
        return 0.0
    same = ~eager.isfinite() & ((result == eager) | (result.isnan() & eager.isnan()))
    if same.any():
        result, eager = result.masked_fill(same, 0), eager.masked_fill(same, 0)
    wide = torch.promote_types(eager.dtype, torch.float32)
    difference, size = _norm(result.to(wide) - eager.to(wide)), _norm(eager.to(wide))
    value = difference / max(size, 1e-30 * math.sqrt(eager.numel()))
    return value if math.isfinite(value) else math.inf


def _norm(x: Tensor) -> float:
    """In fp64 throughout it takes twenty times as long."""
    x = x.flatten()
    whole = x.numel() // SUMMED * SUMMED
    parts = torch.linalg.vector_norm(x[:whole].view(-1, SUMMED), dim=1), torch.linalg.vector_norm(x[whole:])[None]
    return torch.linalg.vector_norm(torch.cat(parts).double()).item()


def compare(results: Any, eager: Any, names: list[str]) -> dict[str, float]:
    """Errors by name; a different number of results is infinite. ``names`` are those of the tensors: None, as for a
    state that was not asked for, is no result, and an artifact need not give it."""
    got, expected = ([x for x in pytree.tree_leaves(tree) if x is not None] for tree in (results, eager))
    if len(got) != len(expected):
        return {"number of results": math.inf}
    pairs = [(a, b) for a, b in zip(got, expected) if torch.is_tensor(b)]
    return {name: error(a, b) for name, (a, b) in zip(names, pairs, strict=True)}


class Report:
    """Collects cases; ``errors`` are the worst of a case."""

    def __init__(self, dtype: torch.dtype, **context: Any) -> None:
        self.context = {**context, "dtype": str(dtype).removeprefix("torch."), "metric": "RMS(x - eager) / RMS(eager)"}
        self.tolerance, self.cases = TOLERANCE[dtype], []

    def add(self, program: str, case: str, sizes: dict[str, int], errors: dict[str, float]) -> None:
        worst = max(errors, key=errors.__getitem__) if errors else None
        self.cases.append(
            {"program": program, "case": case, "sizes": sizes, "error": errors.get(worst, 0.0), "worst": worst}
        )

    def skip(self, program: str, case: str, sizes: dict[str, int], reason: str) -> None:
        self.cases.append({"program": program, "case": case, "sizes": sizes, "skipped": reason})

    def max_error(self) -> float:
        return max((case["error"] for case in self.cases if "error" in case), default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        passed = self.max_error() <= self.tolerance
        figures = {"passed": passed, "max_error": self.max_error(), "tolerance": self.tolerance}
        return {**self.context, **figures, "cases": self.cases}

    def check(self) -> None:
        """Raises ParityError unless every case is within the tolerance."""
        bad = [case for case in self.cases if case.get("error", 0.0) > self.tolerance]
        if bad:
            lines = [f"{c['program']} {c['case']} {c['sizes']}: {c['worst']} is off by {c['error']:.3g}" for c in bad]
            raise ParityError(f"expected errors up to {self.tolerance:g} against eager:\n  " + "\n  ".join(lines))
        if not any("error" in case for case in self.cases):
            raise ParityError("no case could be run")


def language_model(
    report: Report, plans: dict[str, Plan], programs: dict[str, Callable], seed: int = 0, steps: int = 3
) -> None:
    """``prefill`` at the lengths of LENGTHS, from an empty and from a used state, then ``steps`` decode steps.

    The cases are CASES, or LARGE_CASES for a model of more than LARGE parameters: there each length has one case, from
    an empty state or from the one that the case before left. Steps go on from the prefills of DECODED that began empty,
    with the states that the program itself put out there: errors of the whole chain show.
    """
    names = ["logits", *plans["prefill"].states]
    model, device = plans["prefill"].module.model, plans["prefill"].args[0].device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    large = sum(x.numel() for x in model.parameters()) > LARGE

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=generator).to(device)

    def check(name: str, case: str, sizes: dict[str, int], *inputs: Any) -> tuple[Any, Any]:
        """Both states after one call; ``inputs`` are tokens and the program's state, then, if another, eager's."""
        logits, own = programs[name](*inputs[:2])
        reference, expected = plans[name].module(inputs[0], inputs[-1])
        report.add(name, case, sizes, compare((logits, own), (reference, expected), names))
        return own, expected

    chains, used = [], {}
    with inference(model):
        for case, B, goes_on in LARGE_CASES if large else CASES:
            sizes, label = {"batch": B, "T": LENGTHS[case]}, case + (", continued" if goes_on else "")
            state = {name: x[:B] for name, x in used.items()} if goes_on else _fresh_state(model, B)
            own, used = check("prefill", label, sizes, ids(B, LENGTHS[case]), state)
            if case in DECODED and not goes_on:
                chains.append((sizes, own, used))
        for sizes, own, expected in chains:
            for n in range(steps):
                label = {**sizes, "step": n + 1}
                own, expected = check("step", "prefill then decode", label, ids(sizes["batch"]), own, expected)


def _fresh_state(model: nn.Module, batch: int) -> dict[str, Tensor]:
    from gdn_ops.export.program import flatten_state

    return flatten_state(model.init_state(batch))


def module(
    report: Report,
    item: Plan,
    program: ExportedProgram,
    run: Callable,
    names: dict[sympy.Symbol, str],
    outputs: list[str],
) -> None:
    """The example, and each dynamic dimension in turn at sampled sizes: the example's values, cut or repeated.

    Inputs named ``cu_seqlens`` become even bounds of the new length. A size that eager refuses is recorded as skipped.
    """
    traced = user_tensors(program)
    flat, spec = pytree.tree_flatten((item.args, item.kwargs))
    example = [x for x in flat if torch.is_tensor(x)]
    sizes = {}
    for fake, real in zip(traced, example):
        for expected, size in zip(fake.shape, real.shape):
            free = expected.node.expr.free_symbols if isinstance(expected, torch.SymInt) else ()
            if len(free) == 1:  # of 2 * n and the like, too
                (symbol,) = free
                sizes[symbol] = int(sympy.solve(expected.node.expr - size, symbol)[0])
    cases = [("example", dict(sizes))]
    if writes(item, program):  # the second call has what the first one wrote
        cases.append(("example, again", dict(sizes)))
    for symbol in sizes:
        bounds = program.range_constraints[symbol]
        first_only = all(_only_first(fake, symbol) for fake in traced)
        wanted = (1, 3, 5) if first_only and len(sizes) > 1 else tuple(LENGTHS.values())
        inside = sorted({int(bounds.lower), *wanted} - {0, sizes[symbol]})
        cases += [(f"{names[symbol]}={n}", {**sizes, symbol: n}) for n in inside if bounds.lower <= n <= bounds.upper]
    with inference(item.module):
        for case, chosen in cases:
            label = {names[symbol]: n for symbol, n in chosen.items()}
            tensors = iter([_resize(n, f, x, chosen, sizes) for n, f, x in zip(item.inputs, traced, example)])
            args, kwargs = pytree.tree_unflatten([next(tensors) if torch.is_tensor(x) else x for x in flat], spec)
            try:
                eager = item.module(*_copy(args), **_copy(kwargs))
            except (ValueError, IndexError, RuntimeError) as refusal:
                if case == "example":
                    raise
                report.skip("forward", case, label, f"eager refuses: {str(refusal).splitlines()[0]}")
                continue
            report.add("forward", case, label, compare(run(*_copy(args), **_copy(kwargs)), eager, outputs))


def _copy(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, tree)


def _only_first(fake: Tensor, symbol: sympy.Symbol) -> bool:
    later = (size.node.expr for size in fake.shape[1:] if isinstance(size, torch.SymInt))
    return all(symbol not in expression.free_symbols for expression in later)


def _resize(name: str, fake: Tensor, real: Tensor, chosen: dict, old: dict) -> Tensor:
    shape = [int(s.node.expr.subs(chosen)) if isinstance(s, torch.SymInt) else s for s in fake.shape]
    if name.split(".")[-1] == "cu_seqlens":
        total = int(real[-1])
        total = next((chosen[symbol] for symbol in old if old[symbol] == total), total)
        return torch.linspace(0, total, shape[0], dtype=torch.float64).round().to(real)
    for axis, size in enumerate(shape):
        if size != real.shape[axis]:
            real = real.index_select(axis, torch.arange(size, device=real.device) % max(real.shape[axis], 1))
    return real.contiguous()
