"""Every Triton kernel once or more at ragged shapes, small enough for compute-sanitizer:

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitize

Dense and packed, cut into segments and whole, by one warpgroup and by two, wide keys, odd heads, all dtypes, states
in and out, pools with padding, states of tokens. It says what it ran and ends with an error if a result is not finite.
``--only`` takes parts, for processes side by side; ``--device cpu`` runs the CPU kernels, to see that the script itself
is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import gdn_ops
from tests.oracle import make_conv_inputs, make_inputs, make_inputs_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CHUNKED = {
    "cut": ((1, 1541, 1, 2, 128, 128, BF16), None),
    "by parts": ((1, 6150, 1, 24, 128, 128, BF16), None),  # forward, on a Hopper GPU
    "backward by parts": ((1, 450, 4, 12, 128, 128, BF16), None),
    "sparing": ((1, 450, 8, 24, 128, 128, BF16), None),
    "whole": ((2, 131, 1, 2, 64, 96, BF16), None),
    "many heads": ((2, 70, 1, 70, 128, 128, BF16), None),
    "odd heads": ((2, 131, 1, 2, 96, 200, BF16), None),
    "wide values": ((2, 131, 2, 2, 128, 256, BF16), None),
    "packed": ((1, 150, 1, 1, 100, 72, BF16), [0, 1, 1, 70, 150]),
    "packed and cut": ((1, 600, 1, 1, 64, 64, BF16), [0, 3, 3, 600]),
    "many": ((17, 70, 2, 4, 128, 128, BF16), None),
    "wide keys": ((1, 130, 1, 1, 192, 256, FP16), None),
    "fp32": ((1, 70, 1, 2, 40, 24, FP32), None),
}
RECURRENT = {
    "tokens": ((2, 5, 1, 2, 100, 72, BF16), None),
    "packed tokens": ((1, 9, 1, 2, 128, 128, FP32), [0, 0, 4, 9]),
    "one token": ((3, 1, 2, 4, 128, 128, BF16), None),
}


def differentiable(x: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for n, t in x.items()}


def with_gradients(function: Callable, x: dict[str, Tensor | None], **options) -> list[Tensor]:
    x = differentiable(x)
    results = list(function(**x, output_final_state=True, **options))
    wanted = [t for t in x.values() if t is not None and t.requires_grad]
    return results + list(torch.autograd.grad(sum(r.float().square().sum() for r in results), wanted))


# What makes small calls on a Hopper GPU go the ways of large ones.
CUT_SHORT = {"backward by parts": {"SHORTEST_STEPS": 1}, "sparing": {"SHORTEST_STEPS": 1, "LEAST_TO_SPARE": 0}}


def chunked(rule: Callable, shape: tuple, bounds: list[int] | None, device: str) -> list[Tensor]:
    return with_gradients(rule, make_inputs_of(rule, *shape, device, initial_state=True, cu_seqlens=bounds))


def cut_short(limits: dict[str, int], job: Callable[[str], list[Tensor]], device: str) -> list[Tensor]:
    from gdn_ops.kernels import hopper  # which needs Triton

    with patch.multiple(hopper, **limits):
        return job(device)


def recurrent(shape: tuple, bounds: list[int] | None, device: str) -> list[Tensor]:
    x = make_inputs(*shape, device, initial_state=True, cu_seqlens=bounds)
    return list(gdn_ops.recurrent_gated_delta_rule(**x, output_final_state=True))


def convolved(width: int, bounds: list[int] | None, device: str) -> list[Tensor]:
    B, T = (2, 37) if bounds is None else (1, bounds[-1])
    x = make_conv_inputs(B, T, 40, width, BF16, device, initial_state=True, cu_seqlens=bounds)
    return with_gradients(gdn_ops.causal_conv1d, x, activation="silu")


def pools(device: str) -> list[Tensor]:
    indices = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    x = make_inputs(3, 1, 2, 4, 64, 48, BF16, device)
    states, small = (torch.ones(5, 4, 64, 48, dtype=dtype, device=device) for dtype in (torch.float32, BF16))
    tokens = [x[n] for n in ("q", "k", "v", "g", "beta")]
    o, o_small = (gdn_ops.recurrent_gated_delta_rule_(*tokens, pool, indices) for pool in (states, small))
    conv = make_conv_inputs(3, 1, 40, 4, BF16, device)
    windows = torch.ones(5, 40, 3, dtype=BF16, device=device)
    y = gdn_ops.causal_conv1d_update_(conv["x"], windows, conv["weight"], conv["bias"], "silu", indices)
    return [o, states, o_small, small, y, windows]


def drafts(device: str) -> list[Tensor]:
    x = make_inputs(1, 9, 2, 4, 100, 72, BF16, device, cu_seqlens=[0, 4, 4, 9])
    del x["initial_state"]
    states = torch.ones(8, 4, 100, 72, dtype=BF16, device=device)
    indices = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    tokens = torch.tensor([[7, -1, 6, 2, 5, -1, -1, 4, 3]], dtype=torch.int32, device=device)
    o = gdn_ops.recurrent_gated_delta_rule_(**x, state=states, state_indices=indices, token_state_indices=tokens)
    return [o, states]


def jobs() -> dict[str, Callable[[str], list[Tensor]]]:
    """What there is to run, by name; each takes the device."""
    found: dict[str, Callable[[str], list[Tensor]]] = {"pools": pools, "drafts": drafts}
    for name, (shape, bounds) in CHUNKED.items():
        found[name] = partial(chunked, gdn_ops.chunk_gated_delta_rule, shape, bounds)
        if name in CUT_SHORT:
            found[name] = partial(cut_short, CUT_SHORT[name], found[name])
        else:
            found[f"linear {name}"] = partial(chunked, gdn_ops.chunk_gated_linear_attention, shape, bounds)
    for name, (shape, bounds) in RECURRENT.items():
        found[name] = partial(recurrent, shape, bounds)
    for width in (2, 4):
        found[f"convolution {width}"] = partial(convolved, width, None)
        found[f"packed convolution {width}"] = partial(convolved, width, [0, 0, 5, 77])
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=tuple(jobs()), default=tuple(jobs()))
    options = parser.parse_args(arguments)
    for name in options.only:
        results = jobs()[name](options.device)
        wrong = [i for i, x in enumerate(results) if not bool(x.isfinite().all())]
        print(f"{name}: {len(results)} results", flush=True)
        if wrong:
            raise SystemExit(f"{name}: expected finite results, got others in {wrong}")


if __name__ == "__main__":
    main()
