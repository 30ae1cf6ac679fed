"""Causal attention in which a token sees itself and the ``window - 1`` tokens before it.

**Blocks.** T queries are cut into blocks of Q; block n needs the keys of its own Q tokens and of the window in front of
them, so one call of torch's scaled_dot_product_attention over ``B * blocks`` small problems holds ``T * (Q + window)``
scores at most. Keys are copied ``(Q + window) / Q`` times and up to ``2 Q - 1`` padding queries are computed: a large Q
saves copies, which a backward pass keeps, a small one saves work on short prompts, and a program with a symbolic T
chooses before it knows T. So Q is ``TRAINING_BLOCK`` where gradients are recorded and ``QUERY_BLOCK`` elsewhere, and
never above the window. At the paper's window of 2048 a prompt of 5 tokens then costs at most 256 queries, and training
keeps 5 copies of the keys, not 17 (T=4096 on one core: forward and backward 15% faster and a third less memory).

**Flash attention.** Where no state goes in or out, as in training, torch's own (``torch.nn.attention.varlen``: CUDA,
16-bit, see :func:`_has_flash`) takes the window as it is, without copies of keys or scores outside the window. Its
gradients are the same bits twice only under ``torch.use_deterministic_algorithms``. An exported program has blocks, to
run elsewhere, too.

**State.** A ring: token p has slot ``p % window`` in ``key, value [B, window, KVH, D]``; ``position [B]`` int64 counts
the tokens seen. Keys are stored rotated. One token (decode) overwrites its slot and attends to the whole ring, whose
order does not matter; longer input reads the ring in order of time in front of its own keys. Nothing is written in
place.

**Short input.** T tokens within the window, where nothing is remembered, are plain causal attention, without blocks.

**Symbolic sizes.** A compiler that meets a size asks whether it is 0 or 1, or whether one fits into another, and lets
its program run only where the answer is the same. So while it traces there is one block more than needed (never just
1), padding is by constants, and export picks by index instead of cutting.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.varlen import varlen_attn

from gdn_ops.nn.mixer import Mixer
from gdn_ops.nn.rotary import rotate
from gdn_ops.nn.tracing import is_exporting

QUERY_BLOCK, TRAINING_BLOCK = 128, 512
# torch 2.11 takes fewer key heads as they are, later ones ask to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class SlidingWindowAttention(Mixer):
    """Sliding-window attention with rotary positions and grouped key and value heads, as a mixer of tokens.

    Positions count real tokens and start at 0 in every packed sequence. Packed sequences (``cu_seqlens``) neither take
    nor give a state. Within a window as long as any sequence it is full attention.

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads``; default ``num_heads``.
        head_dim: features a head, even; default ``hidden_size // num_heads``.
        window: how many tokens a token sees, itself included.
        rope_theta: base of the rotary frequencies.

    Example::

        >>> layer = SlidingWindowAttention(64, num_heads=4, num_kv_heads=2, window=8)
        >>> x = torch.randn(1, 10, 64)
        >>> y, state = layer(x, output_state=True)
        >>> y_next, state = layer(x[:, :1], state=state)
        >>> y_next.shape, state["key"].shape, state["position"]
        (torch.Size([1, 1, 64]), torch.Size([1, 8, 2, 16]), tensor([11]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 2048,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.window, self.rope_theta = hidden_size, num_heads, window, rope_theta
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size={hidden_size}, got {num_heads}")
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: expected a positive even number, got {self.head_dim}")
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        q_dim, kv_dim = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(hidden_size, q_dim + 2 * kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, hidden_size, bias=False)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}x{self.head_dim}, kv_heads={self.num_kv_heads}, window={self.window}"

    @property
    def input_proj(self) -> nn.Module:
        return self.qkv_proj

    def _state_shapes(self, batch) -> dict[str, tuple]:
        ring = (batch, self.window, self.num_kv_heads, self.head_dim)
        return {"key": ring, "value": ring, "position": (batch,)}

    def _state_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"position": torch.int64}

    def _check_call(self, state, hidden_states, cu_seqlens, output_state) -> None:
        """Packed sequences neither take nor give a state here."""
        if cu_seqlens is not None and output_state:
            raise ValueError("cu_seqlens: expected None with state or output_state in attention, got a tensor")
        super()._check_call(state, hidden_states, cu_seqlens, output_state)

    def _mix(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, dict[str, Tensor] | None]:
        T = x.shape[1]
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        token, sequence = torch.arange(T, device=x.device), None
        if cu_seqlens is not None:
            bounds = cu_seqlens.long()
            sequence = torch.searchsorted(bounds, token, right=True)
            position = (token - bounds[sequence - 1])[None]
        else:
            position = token[None] if state is None else state["position"][:, None] + token
        q, k = rotate(qk, position, self.rope_theta).split([self.num_heads, self.num_kv_heads], dim=2)
        if statically_known_true(T == 1) and state is not None and lengths is None:
            o, new_state = self._one_token(q, k, v, state)
        elif statically_known_true(self.window >= T) and not output_state and cu_seqlens is None:
            o, new_state = _within_window(q, k, v), None
        elif not output_state and not is_exporting() and _has_flash(q):
            o, new_state = _flash(q, k, v, self.window, cu_seqlens), None
        else:
            o, k, v = self._blocks(q, k, v, state, sequence)
            new_state = self._advance(state, k, v, T if lengths is None else lengths) if output_state else None
        return self.o_proj(o), new_state

    def _one_token(self, q, k, v, state) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode: ``q [B, 1, H, D]`` over the ring with k and v in their slot."""
        position, slot = state["position"][:, None], torch.arange(self.window, device=q.device)
        mine = (slot == position % self.window)[:, :, None, None]
        key = torch.where(mine, k.to(state["key"].dtype), state["key"])
        value = torch.where(mine, v.to(state["value"].dtype), state["value"])
        filled = (slot <= position)[:, None, None, :]
        q_bkgd = q.unflatten(2, (self.num_kv_heads, -1)).squeeze(1)
        k_bkwd, v_bkwd = (y.to(q.dtype).transpose(1, 2) for y in (key, value))
        o_bkgd = F.scaled_dot_product_attention(q_bkgd, k_bkwd, v_bkwd, attn_mask=filled)
        return o_bkgd.flatten(1)[:, None], {"key": key, "value": value, "position": state["position"] + 1}

    def _block_sizes(self) -> tuple[int, int]:
        """Q, and how many earlier blocks of keys a block of queries sees."""
        Q = min(self.window, TRAINING_BLOCK if torch.is_grad_enabled() else QUERY_BLOCK)
        return Q, -(-self.window // Q)

    def _blocks(self, q, k, v, state, sequence) -> tuple[Tensor, Tensor, Tensor]:
        """``q, k, v [B, T, heads, D]``, ``sequence [T]`` the number of each token's packed sequence, if packed.

        Returns the output ``[B, T, H * D]`` and, for :meth:`_advance`, keys and values ``[B, reach * Q + T + 2 * Q,
        KVH * D]`` with the remembered ones in front.
        """
        (B, T), (Q, reach), window = q.shape[:2], self._block_sizes(), self.window
        blocks = (T + Q - 1) // Q + (1 if torch.compiler.is_compiling() else 0)
        before = reach * Q - (0 if state is None else window)
        rings = (None, None) if state is None else _in_time_order(state)
        k, v = (_pad(y.flatten(2), before, 2 * Q, ring) for y, ring in zip((k, v), rings))
        q = _windows(_pad(q.flatten(2), 0, 2 * Q), blocks, Q, Q)

        width = (reach + 1) * Q
        age = torch.arange(Q, device=q.device)[:, None] + reach * Q - torch.arange(width, device=q.device)
        mask = ((age >= 0) & (age < window))[None]
        key = torch.arange((reach + blocks) * Q, device=q.device)
        remembered = key[:1] * 0 if state is None else state["position"]
        real = (key >= reach * Q - remembered[:, None]).expand(B, -1)
        mask = mask & _windows(real[:, :, None], blocks, Q, width).mT
        if sequence is not None:  # padding gets a number of its own, so that no row is masked throughout
            sequence = _pad(sequence[None, :, None], reach * Q, 2 * Q, value=-1)
            sequence = _windows(sequence, blocks, Q, width)
            mask = mask & (sequence.mT == sequence[:, reach * Q :])

        G, D = self.num_heads // self.num_kv_heads, self.head_dim
        if G > 1:  # the heads of a group are more queries of one key head
            mask = mask[:, None].expand(-1, G, -1, -1).flatten(1, 2)
        q_nkqd = q.unflatten(2, (self.num_kv_heads, G, D)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k_nkwd, v_nkwd = (_windows(y, blocks, Q, width).unflatten(2, (-1, D)).transpose(1, 2) for y in (k, v))
        o_nkqd = F.scaled_dot_product_attention(q_nkqd, k_nkwd, v_nkwd, attn_mask=mask[:, None])
        o = o_nkqd.unflatten(2, (G, Q)).permute(0, 3, 1, 2, 4).flatten(2)
        return _first(o.flatten(0, 1).unflatten(0, (B, blocks * Q)), T), k, v

    def _advance(self, state, k, v, count) -> dict[str, Tensor]:
        """The state ``count`` (a number, or one a row) tokens later, from what :meth:`_blocks` returned."""
        (Q, reach), window = self._block_sizes(), self.window
        start = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device) if state is None else state["position"]
        end = start + count
        age = (end[:, None] - 1 - torch.arange(window, device=k.device)) % window  # of the newest token in each slot
        index = reach * Q + (end - start)[:, None] - 1 - age
        ring = {name: _take(y, index).unflatten(2, (-1, self.head_dim)) for name, y in (("key", k), ("value", v))}
        if state is not None:
            ring = {name: y.to(state[name].dtype) for name, y in ring.items()}
        return {**ring, "position": end}


def _within_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to all before it, ``[B, T, H * D]``; padding on the right of a row is seen by none."""
    # Repeated rather than ``enable_gqa``, which torch's memory-efficient kernels do not take.
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
    o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    return o.transpose(1, 2).flatten(2)


def _has_flash(q: Tensor) -> bool:
    """Whether torch's flash attention takes a window of queries like ``q [B, T, H, D]``, and may (see
    ``torch.backends.cuda.enable_flash_sdp``)."""
    width = q.shape[3]
    return q.is_cuda and q.element_size() == 2 and width % 8 == 0 and width <= _widest_flash_head(q.device)


@torch.compiler.assume_constant_result
def _widest_flash_head(device: torch.device) -> int:
    """0 without flash attention. Not every card has the gradients of more than 192."""
    cuda, (major, minor) = torch.backends.cuda, torch.cuda.get_device_capability(device)
    usable = torch.version.hip is None and cuda.is_flash_attention_available() and cuda.flash_sdp_enabled()
    if not usable or major < 8:
        return 0
    return 256 if (major, minor) in ((8, 0), (9, 0)) else 192


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int, cu_seqlens: Tensor | None) -> Tensor:
    """Attention within the window and, if packed, the sequence, ``[B, T, H * D]``; rows count as packed ones."""
    B, T = q.shape[:2]
    bounds = torch.arange(B + 1, device=q.device) * T if cu_seqlens is None else cu_seqlens
    bounds, sizes = bounds.to(torch.int32), (window - 1, 0)
    v = v.contiguous()  # a backward pass keeps it, and with a view the whole projection, of which the rest is done with
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    return varlen_attn(q, k, v, bounds, bounds, T, T, window_size=sizes, **_GROUPED).flatten(1).unflatten(0, (B, T))


def _pad(x: Tensor, before: int, after: int, ring: Tensor | None = None, value: int = 0) -> Tensor:
    """``x [B, T, F]`` with ``before`` constants and the ring in front and ``after`` constants behind."""
    front = [x.new_full((x.shape[0], before, x.shape[2]), value)] if before else []
    front += [] if ring is None else [ring.to(x.dtype)]
    return torch.cat([*front, x, x.new_full((x.shape[0], after, x.shape[2]), value)], 1)


def _first(x: Tensor, length) -> Tensor:
    """``x[:, :length]``; by index in export, as in :func:`_windows`."""
    if is_exporting():
        return x.index_select(1, torch.arange(length, device=x.device))
    return x.narrow(1, 0, length)


def _windows(x: Tensor, blocks, Q: int, width: int) -> Tensor:
    """From ``x [B, L, F]`` for each block n its tokens ``n Q`` to ``n Q + width``: ``[B * blocks, width, F]``.

    Slices are what has a cheap gradient (a sum, without atomic additions). Export cannot prove that they fit, and asks
    nothing about an index.
    """
    if is_exporting():
        start, offset = torch.arange(blocks, device=x.device) * Q, torch.arange(width, device=x.device)
        return x[:, start[:, None] + offset].flatten(0, 1)
    x = x.narrow(1, 0, (blocks - 1) * Q + width).unflatten(1, (-1, Q))
    return torch.cat([x.narrow(1, i, blocks) for i in range(width // Q)], 2).flatten(0, 1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, T, F]`` at ``index [B, window]`` along T."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _in_time_order(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The rings from the oldest token to the newest, ``[B, window, KVH * D]``."""
    position, window = state["position"], state["key"].shape[1]
    slot = (position[:, None] + torch.arange(window, device=position.device)) % window
    return _take(state["key"].flatten(2), slot), _take(state["value"].flatten(2), slot)
