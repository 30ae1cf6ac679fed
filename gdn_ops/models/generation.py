"""Text from a model with explicit state: one prefill, then one step a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gdn_ops.models.hybrid import HybridLM


class Sampling(NamedTuple):
    """How a token is chosen; see :meth:`gdn_ops.models.HybridLM.stream`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None


def check(sampling: Sampling, max_new_tokens: int, eos_token_id: int | None, vocab_size: int) -> None:
    """ValueError or TypeError naming the argument."""
    temperature, top_k, top_p, generator = sampling
    for name, x in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("eos_token_id", eos_token_id)):
        if x is not None and (not isinstance(x, int) or isinstance(x, bool)):
            raise TypeError(f"{name}: expected an integer, got {x!r}")
    for name, x in (("temperature", temperature), ("top_p", top_p)):
        if x is not None and (not isinstance(x, (int, float)) or isinstance(x, bool)):
            raise TypeError(f"{name}: expected a number, got {x!r}")
    if max_new_tokens is None or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    if temperature is None or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id: expected a token in [0, {vocab_size}), got {eos_token_id}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k, top_p: expected None with temperature=0 (the likeliest token is taken), got values")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def choose(logits: Tensor, sampling: Sampling) -> Tensor:
    """A token ``[B]`` for each row of ``logits [B, vocab_size]``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The likeliest logit becomes 0 first, so that no temperature, however small, makes the largest one infinite.
    logits, least = logits.float(), torch.finfo(torch.float32).tiny  # what is less may be 0 in fp32
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, least)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        last = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    probability = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = probability.sort(dim=-1, descending=True, stable=True)
        ahead = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(ahead >= max(sampling.top_p, least), 0)
        probability = torch.zeros_like(ordered).scatter(-1, index, kept)
    return torch.multinomial(probability, 1, generator=sampling.generator)[:, 0]


@torch.no_grad()
def stream(
    model: HybridLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """The loop behind :meth:`gdn_ops.models.HybridLM.stream`, whose arguments these are."""
    if max_new_tokens == 0:
        return
    logits, state = model.prefill_last(input_ids, model.init_state(input_ids.shape[0]), attention_mask)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for count in range(1, max_new_tokens + 1):
        token = choose(logits, sampling)
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended = ended | (token == eos_token_id)
        yield token
        if count == max_new_tokens or (eos_token_id is not None and bool(ended.all())):
            return
        logits, state = model.step(token, state)
