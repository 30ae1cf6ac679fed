"""Who is timed on tensors: gdn_ops, and FLA, FlashQLA and FlashInfer where they are installed.

A provider turns inputs into a call for a direction, or says why it cannot (:class:`Unavailable`). Backward calls are
made free of autograd wherever the library has such a function, so that graph capture sees kernels alone; otherwise
``torch.autograd.grad`` runs over a graph that is kept.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch

import gdn_ops
from perf.clocks import Call
from perf.measure import Candidate, Measurement, describe
from perf.shapes import STATE_DTYPES, Inputs


class Unavailable(Exception):
    """A provider that is not installed, or has no such direction."""


class Provider(NamedTuple):
    """``bind(inputs, direction)`` gives a call whose result is, or starts with, the output or ``dq``; ``library`` is
    the module it needs and the distribution that has it."""

    name: str
    bind: Callable[[Inputs, str], Call]
    library: tuple[str, str] | None = None


def import_library(module: str, distribution: str) -> ModuleType:
    """The module; :class:`Unavailable` with how to install it otherwise."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and not module.startswith(error.name.split(".")[0]):
            raise Unavailable(f"{distribution} is installed but cannot be imported: {error}") from error
        raise Unavailable(f"{distribution} is not installed: pip install {distribution}") from error


def no_grad(call: Call) -> Call:
    """``call`` without autograd."""

    def run():
        with torch.no_grad():
            return call()

    return run


def _in_place(x: Inputs, direction: str) -> Call:
    """The step on a pool of states of any dtype, which it changes."""
    tensors, state = (x.q, x.k, x.v, x.g, x.beta), x.state.to(STATE_DTYPES[direction], copy=True)
    return no_grad(lambda: gdn_ops.recurrent_gated_delta_rule_(*tensors, state, scale=x.scale))


def _gdn_ops(x: Inputs, direction: str) -> Call:
    if direction == "decode, bf16 state":
        return _in_place(x, direction)  # the functional step takes and gives fp32 states alone
    op, tensors = torch.ops.gdn, (x.q, x.k, x.v, x.g, x.beta)

    def forward():
        return op.chunk_gated_delta_rule(*tensors, None, None, x.scale, False)

    def backward():
        return op.chunk_gated_delta_rule_backward(x.do, None, *tensors, None, None, x.scale)

    def both():
        forward()
        return backward()

    def decode():
        return op.recurrent_gated_delta_rule(*tensors, x.state, None, x.scale, True)

    calls = {"forward": forward, "backward": backward, "forward+backward": both, "decode": decode}
    return no_grad(calls[direction])


def _gdn_ops_in_place(x: Inputs, direction: str) -> Call:
    if direction != "decode":
        raise Unavailable("gdn_ops in place: expected decode, got " + direction)
    return _in_place(x, direction)


def _gdn_ops_portable(x: Inputs, direction: str) -> Call:
    """The kernels that packages hold, where a chip has others of its own."""
    if direction in STATE_DTYPES or x.q.device.type != "cuda":
        raise Unavailable(f"gdn_ops portable: expected no decode, on CUDA, got {direction} on {x.q.device.type}")
    from gdn_ops.kernels import hopper

    if not hopper.is_for(x.q):
        raise Unavailable("gdn_ops portable: these are gdn_ops' own on this GPU")
    call = _gdn_ops(x, direction)

    def run():
        with mock.patch.object(hopper, "serves", return_value=False):
            return call()

    return run


def by_autograd(function: Callable, x: Inputs, direction: str, tensors: Sequence[torch.Tensor] | None = None) -> Call:
    """Backward or both through the public function's own graph; ``tensors`` are its first arguments (the delta rule's
    unless given)."""
    tensors = (x.q, x.k, x.v, x.g, x.beta) if tensors is None else tensors
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def forward():
        return function(*leaves, scale=x.scale)[0]

    if direction == "forward+backward":
        return lambda: torch.autograd.grad(forward(), leaves, x.do)
    kept: list[torch.Tensor] = []

    def backward():
        # Built by the first call, which a clock makes on the stream that it then captures: autograd runs a backward
        # on the stream of its forward.
        if not kept:
            kept.append(forward())
        return torch.autograd.grad(kept[0], leaves, x.do, retain_graph=True)

    return backward


def _accepts(function: Callable, *names: str) -> bool:
    parameters = inspect.signature(function).parameters
    return all(name in parameters for name in names)


def _fla(x: Inputs, direction: str) -> Call:
    public = importlib.import_module("fla.ops.gated_delta_rule")
    named = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta, "scale": x.scale}
    if direction in STATE_DTYPES:  # whatever the state's dtype, its final state is fp32
        recurrent, state = public.fused_recurrent_gated_delta_rule, x.state.to(STATE_DTYPES[direction])
        return no_grad(lambda: recurrent(**named, initial_state=state, output_final_state=True))
    inner = importlib.import_module("fla.ops.gated_delta_rule.chunk")
    run_forward = getattr(inner, "chunk_gated_delta_rule_fwd", None)
    run_backward = getattr(inner, "chunk_gated_delta_rule_bwd", None)
    known = (
        run_forward is not None
        and run_backward is not None
        and _accepts(run_forward, *named, "initial_state", "output_final_state")
        and _accepts(run_backward, *named, "A", "initial_state", "do", "dht")
    )
    if not known:
        if direction == "forward":
            return no_grad(lambda: public.chunk_gated_delta_rule(**named))
        return by_autograd(public.chunk_gated_delta_rule, x, direction)

    def forward():
        g_sum, o, A, *_ = run_forward(**named, initial_state=None, output_final_state=False)
        return o, g_sum, A

    def backward(g_sum, A):
        return run_backward(**{**named, "g": g_sum}, A=A, initial_state=None, do=x.do, dht=None)

    return no_grad(_direct(forward, backward, direction))


def _direct(forward: Callable, backward: Callable, direction: str) -> Call:
    """``forward()`` gives ``(o, *saved)`` and ``backward(*saved)`` the gradients."""
    if direction == "forward":
        return forward
    if direction == "forward+backward":
        return lambda: backward(*forward()[1:])
    kept: list[tuple] = []

    def run():
        if not kept:
            kept.append(tuple(forward()[1:]))
        return backward(*kept[0])

    return run


def _flash_qla(x: Inputs, direction: str) -> Call:
    library = importlib.import_module("flash_qla")
    if direction in STATE_DTYPES:
        raise Unavailable("flash-qla has no decode")
    named = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta, "scale": x.scale}
    run_forward, run_backward = library.chunk_gated_delta_rule_fwd, library.chunk_gated_delta_rule_bwd
    if not (_accepts(run_forward, *named, "is_train") and _accepts(run_backward, *named, "A", "do", "cp_cache")):
        if direction == "forward":
            return no_grad(lambda: library.chunk_gated_delta_rule(**named))
        return by_autograd(library.chunk_gated_delta_rule, x, direction)
    train = direction != "forward"

    def forward():
        g_sum, A, o, _, _, cache = run_forward(
            **named, output_final_state=False, enable_fwd_cp_cache=train, is_train=train
        )
        return o, g_sum, A, cache

    def backward(g_sum, A, cache):
        return run_backward(**{**named, "g": g_sum}, A=A, do=x.do, cp_cache=cache)

    return no_grad(_direct(forward, backward, direction))


def _flash_infer(x: Inputs, direction: str) -> Call:
    """Its batch is packed and its gate is ``exp(g)``; both are made before the clock runs."""
    if direction != "forward":
        raise Unavailable("FlashInfer: expected forward, got " + direction)
    library = importlib.import_module("flashinfer.gdn_prefill")
    N, T = x.q.shape[:2]
    tensors = [t.flatten(0, 1) for t in (x.q, x.k, x.v, x.g.float().exp(), x.beta.float())]
    cu_seqlens = torch.arange(0, (N + 1) * T, T, device=x.q.device)
    run = library.chunk_gated_delta_rule
    return no_grad(lambda: run(*tensors, scale=x.scale, cu_seqlens=cu_seqlens).unflatten(0, (N, T)))


OURS = "gdn_ops"
PEER_MODULES = ("fla", "flash_qla", "flashinfer", "mamba_ssm")
PROVIDERS = {
    p.name: p
    for p in (
        Provider(OURS, _gdn_ops),
        Provider("gdn_ops in place", _gdn_ops_in_place),
        Provider("gdn_ops portable", _gdn_ops_portable),
        Provider("FLA", _fla, ("fla.ops.gated_delta_rule", "flash-linear-attention")),
        Provider("FlashQLA", _flash_qla, ("flash_qla", "flash-qla")),
        Provider("FlashInfer", _flash_infer, ("flashinfer.gdn_prefill", "flashinfer-python")),
    )
}


def absent(providers: Iterable[Provider]) -> dict[str, str]:
    """The providers whose library cannot be imported, and what to do about it, by name."""
    reasons = {}
    for provider in providers:
        if provider.library is not None:
            try:
                import_library(*provider.library)
            except Unavailable as error:
                reasons[provider.name] = str(error)
    return reasons


def share_autotuning(i: int, n: int) -> None:
    """Leaves every n-th configuration, from the i-th, to each Triton autotuner of the peers' loaded modules, and keeps
    what they then choose to this process: for warming caches up, never for measuring."""
    if n == 1:
        return
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in PEER_MODULES:
            continue
        for kernel in list(vars(module).values()):
            while kernel is not None and not isinstance(kernel, autotuner):
                kernel = getattr(kernel, "fn", None) if type(kernel).__module__.startswith("triton.") else None
            if kernel is not None and not hasattr(kernel, "shared"):
                kernel.configs = kernel.configs[i::n] or kernel.configs[:1]
                kernel.cache_results, kernel.shared = False, True


def bind_all(
    providers: Iterable[Provider], sets: Sequence[Inputs], direction: str
) -> tuple[list[Candidate], list[Measurement]]:
    """A candidate for every provider that has this direction; of one that fails to bind, an empty measurement."""
    candidates, failed = [], []
    for provider in providers:
        try:
            candidates.append(Candidate(provider.name, [provider.bind(x, direction) for x in sets]))
        except Unavailable:
            continue
        except Exception as error:  # a broken peer is reported in its row, never fatal
            failed.append(Measurement(provider.name, None, "", describe(error)))
    return candidates, failed


def first_result(call: Call) -> torch.Tensor:
    """The output, or ``dq`` of a backward."""
    result = call()
    return result[0] if isinstance(result, (tuple, list)) else result


def difference(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative RMS difference, in parts: a million tokens in fp64 would not fit beside their inputs."""
    of_difference = of_reference = 0.0
    for a, b in zip(x.flatten().split(2**26), reference.flatten().split(2**26), strict=True):
        b = b.double()
        of_difference += float((a.double() - b).square().sum())
        of_reference += float(b.square().sum())
    return (of_difference / max(of_reference, 1e-300)) ** 0.5


def forward_and_backward(x: Inputs) -> Call:
    """Both by our public function, as training calls it."""
    return by_autograd(gdn_ops.chunk_gated_delta_rule, x, "forward+backward")


def peak_of(call: Call) -> float:
    """MiB that a call takes, results included, beyond what was there before it (CUDA)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
