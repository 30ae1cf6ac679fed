"""The rule's Triton entry points by name of result, and how each is held against the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.kernels.interpreter import call
from tests.oracle import GRADIENTS, assert_all_close, assert_close, cotangents, expected, make_inputs

INPUTS = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")
TOKENS = INPUTS[:5]
# Of the rule with beta, and of the one without.
CHUNK = {
    True: ("chunk_forward:chunk_forward", "chunk_backward:chunk_backward"),
    False: ("linear_attention:chunk_forward", "linear_attention_backward:chunk_backward"),
}
RECURRENT = {True: "recurrent:recurrent_forward", False: "linear_attention:recurrent_forward"}
LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)


def scale_of(x: dict) -> float:
    return x["q"].shape[-1] ** -0.5


def linear(x: dict) -> dict:
    """Inputs of gated linear attention: those without ``beta``, by which everything here knows the rule."""
    return {n: t for n, t in x.items() if n != "beta"}


def arguments_of(x: dict) -> list:
    return [x[n] for n in INPUTS if n in x]


def forward(x: dict, entry: str | None = None, output_final_state: bool = True, **cut) -> dict[str, Tensor]:
    """By the chunk kernels unless another ``entry`` is named."""
    entry = entry or CHUNK["beta" in x][0]
    o, final_state = call(entry, *arguments_of(x), scale_of(x), output_final_state, **cut).result
    assert o.is_contiguous() and o.dtype == x["v"].dtype and final_state.dtype == torch.float32
    if not output_final_state:
        assert final_state.shape[0] == 0
        return {"o": o}
    return {"o": o, "final_state": final_state}


def backward(x: dict, do: Tensor, ds: Tensor | None, **cut) -> dict[str, Tensor]:
    """Gradients by name, in the dtypes of what they are gradients of."""
    grads = call(CHUNK["beta" in x][1], do, ds, *arguments_of(x), scale_of(x), **cut).result
    results = {"d" + n: grad for n, grad in zip([n for n in GRADIENTS if n in x], grads)}
    if x["initial_state"] is None:
        assert results.pop("dinitial_state").shape[0] == 0
    for n, grad in results.items():
        assert grad.dtype == x[n[1:]].dtype, n
    return results


def chunk(x: dict, do: Tensor, ds: Tensor, **cut) -> dict[str, Tensor]:
    """Outputs and gradients of the chunk kernels; ``cut`` is what :func:`tests.kernels.interpreter.cutting` takes."""
    return {**forward(x, **cut), **backward(x, do, ds, **cut)}


def check_chunk(x: dict, dtype: torch.dtype | None = None, do: Tensor | None = None, **cut) -> dict[str, Tensor]:
    """Values and every gradient of the chunk kernels inside the table."""
    made, ds = cotangents(x)
    do = made if do is None else do
    got = chunk(x, do, ds, **cut)
    assert_all_close(got, expected(x, scale_of(x), do=do, ds=ds), dtype or x["q"].dtype)
    return got


def check_recurrent(x: dict, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    got = forward(x, RECURRENT["beta" in x])
    assert_all_close(got, expected(x, scale_of(x)), dtype or x["q"].dtype)
    return got


def one_projection(x: dict) -> dict:
    """q, k, v cut from one projection and the gates from another, an odd column into it: no row is aligned."""
    q, k, v = (x[n] for n in "qkv")
    fused = torch.cat([q[..., :1, :1].flatten(2), q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
    parts = fused.split([1, *(t[0, 0].numel() for t in (q, k, v))], dim=-1)[1:]
    gates = torch.cat([x["g"], x.get("beta", x["g"])], dim=-1).chunk(2, dim=-1)
    tokens = {n: part.unflatten(2, x[n].shape[2:]) for n, part in zip("qkv", parts)}
    return {**x, **tokens, **{n: gate for n, gate in zip(("g", "beta"), gates) if n in x}}


def head_first(x: dict) -> dict:
    return {**x, **{n: x[n].transpose(1, 2).contiguous().transpose(1, 2) for n in TOKENS if n in x}}


def last_strided(x: dict) -> dict:
    return {**x, **{n: torch.stack([x[n], x[n] * 0 + 9], dim=-1).flatten(-2)[..., ::2] for n in TOKENS if n in x}}


LAYOUTS = (one_projection, head_first, last_strided)


def inverse_inputs(B: int, T: int, H: int, HV: int, K: int, case: str, dtype: torch.dtype, device: str) -> dict:
    """For the inverse of the kernels for Hopper; ``case`` says what is special."""
    x = make_inputs(B, T, H, HV, K, 128, dtype, device)
    if case == "strided":
        x["g"], x["beta"] = torch.cat([x["g"], x["beta"], x["beta"]], dim=-1).split(HV, dim=-1)[:2]
    elif case == "16-bit gates":
        x["g"], x["beta"] = x["g"].bfloat16(), x["beta"].bfloat16()
    elif case in ("one key", "one key 1.9"):
        x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
        x["g"], x["beta"] = x["g"] * 1e-3, torch.full_like(x["beta"], 1.9 if case == "one key 1.9" else 0.999)
    elif case in ("strong", "infinite"):
        x["g"][:, 5::7] = -1e4 if case == "strong" else float("-inf")
    return x


def check_inverse(here, there, case: str) -> None:
    """An ``IntraChunk`` of the kernel for Hopper, and the portable one."""
    high, low = here.c_sum.double().unflatten(-1, (2, -1)).unbind(-2)
    here, bits = here._replace(c_sum=(high + low) * math.log(2.0)), 8 if here.T.dtype == torch.bfloat16 else 11
    for name in here._fields:
        got, want = getattr(here, name), getattr(there, name)
        if got is None:
            continue
        assert got.dtype == want.dtype and got.isfinite().all(), name
        if name not in ("T", "inverse"):
            assert_close(got, want, 2e-6, name)
        elif case not in ("one key", "one key 1.9"):
            assert_close(got, want, 0.3 * 2**-bits, name)
        else:  # what is lost in a row differs where one of many roundings does, but no more than one is missing
            assert_close(got, want, 2 * 2**-bits, name)
            lost = (got.double() - want.double()).cumsum(-2)
            assert lost.abs().max() <= 8 * 2**-bits * want.abs().max(), name


def check_maps(here, there, table, bound: float) -> None:
    """``Maps`` of the kernel for Hopper, and the portable ones: of both, only what something needs is written."""
    place = torch.arange(table.segments) % (table.segments // table.sequences)
    first, last = place == 0, place == place.max()
    assert_close(here.B[~last], there.B[~last], bound, "B")
    M, want = (maps.M[~(first | last)].float().sum(2) for maps in (here, there))
    assert_close(M, want, bound, "M")
