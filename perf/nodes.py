"""What bounds the portable rule in ONNX Runtime on the CPU.

No operator of ONNX's standard multiplies, adds and decays at once, so whoever writes the rule in them needs at least
the nodes listed here, each with its result in memory. They are timed one by one, several calls at a time on the same
operands, in turns with the fused kernel and with the whole rule; then come the whole rule's own nodes, from the
runtime's profile.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from gdn_ops.lowering.onnx.rule import CHUNK

from perf import cpu_providers
from perf.clocks import Call, WallClock
from perf.measure import Candidate, Quantiles, interleave
from perf.providers import import_library
from perf.shapes import Inputs, Shape, make_inputs

FUSED = "ORT com.microsoft"
PROFILED_RUNS, REPEATS = 20, 8


class Node(NamedTuple):
    """A node that the rule needs ``times`` a chunk, or a token; ``operands`` are the shapes of its two inputs."""

    what: str
    kind: str
    operands: tuple[tuple[int, ...], tuple[int, ...]]
    times: int = 1


def token_nodes(shape: Shape) -> list[Node]:
    _, HV, N, _, K, V = shape
    B, state = N * HV, (N * HV, K, V)
    return [
        Node("decay of the state", "Mul", (state, (B, 1, 1))),
        Node("k w^T", "Mul", ((B, K, 1), (B, 1, V))),
        Node("their sum", "Add", (state, state)),
        Node("k S, q S", "MatMul", ((B, 1, K), state), 2),
    ]


def chunk_nodes(shape: Shape, chunk: int = CHUNK) -> list[Node]:
    H, HV, N, _, K, V = shape
    B, state = N * HV, (N * HV, K, V)
    return [
        Node("[k; q] S", "MatMul", ((B, 2 * chunk, K), state)),
        Node("k^T v'", "MatMul", ((B, K, chunk), (B, chunk, V))),
        Node("[k; q] k^T", "MatMul", ((N * H, 2 * chunk, K), (N * H, K, chunk))),
        Node("M v, P v'", "MatMul", ((B, chunk, chunk), (B, chunk, V)), 2),
        Node("decay of the state", "Mul", (state, (B, 1, 1))),
        Node("sum of the state", "Add", (state, state)),
    ]


def single(node: Node) -> Call:
    """The node alone, in a session of its own."""
    from onnx import helper

    operands = [torch.randn(shape) for shape in node.operands]
    result = operands[0] @ operands[1] if node.kind == "MatMul" else operands[0] * operands[1]
    names = {name: list(x.shape) for name, x in zip("ab", operands)}
    proto = helper.make_node(node.kind, ["a", "b"], ["y"])
    made = cpu_providers.model(proto, names, {"y": list(result.shape)}, {"": 18})
    return cpu_providers.bound(cpu_providers.session(made), dict(zip("ab", operands)), [result])


def profile(x: Inputs) -> dict[str, tuple[float, float]]:
    """Of the portable rule: operator to how many nodes of it run in a call and their milliseconds, together."""
    with tempfile.TemporaryDirectory() as folder:
        session = cpu_providers.session(cpu_providers.portable_model(x), Path(folder) / "nodes")
        call = cpu_providers.portable_call(session, x)
        for _ in range(PROFILED_RUNS):
            call()
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]].append(event["dur"] / 1e3)
    for outer in ("If", "Scan"):  # their time is that of the nodes in them
        found.pop(outer, None)
    return {name: (len(times) / PROFILED_RUNS, sum(times) / PROFILED_RUNS) for name, times in found.items()}


def report(shape: Shape, seconds: float) -> str:
    """Two tables, after some ``seconds``."""
    import_library("onnxruntime", "onnxruntime")
    if shape.T == 1:
        direction, unit, nodes, count = "decode", "token", token_nodes(shape), 1
    else:
        direction, unit, nodes, count = "forward", "chunk", chunk_nodes(shape), -(-shape.T // CHUNK)
    x = make_inputs(shape, torch.float32, "cpu")
    whole = [FUSED, cpu_providers.PORTABLE]
    candidates = [Candidate(node.what, [single(node)]) for node in nodes]
    candidates += [Candidate(name, [cpu_providers.CPU_PROVIDERS[name].bind(x, direction)]) for name in whole]
    times = {m.provider: m.times for m in interleave(candidates, [WallClock()], seconds, REPEATS, most=5000)}
    needed = _sum([times[node.what] for node in nodes], [node.times * count for node in nodes])
    lines = [f"{shape} {direction}, {torch.get_num_threads()} threads, milliseconds: median (least)"]
    lines += [f"  {node.what}: {node.kind} x {node.times} a {unit}: {_shown(times[node.what])}" for node in nodes]
    lines += [f"  all of them, {count} {unit}{'s' if count > 1 else ''}: {needed[0]:.3g} ({needed[1]:.3g})"]
    lines += [f"  {name}: {_shown(times[name])}" for name in whole]
    lines += [f"  nodes of {cpu_providers.PORTABLE} in a call, the profiler's own time among them:"]
    for name, (runs, total) in sorted(profile(x).items(), key=lambda item: -item[1][1])[:12]:
        lines += [f"    {name} x {runs:.0f}: {total:.3g}"]
    return "\n".join(lines)


def _sum(times: list[Quantiles], counts: list[int]) -> tuple[float, float]:
    return tuple(sum(getattr(t, name) * n for t, n in zip(times, counts)) for name in ("p50", "least"))


def _shown(times: Quantiles) -> str:
    return f"{times.p50:.3g} ({times.least:.3g})"
