"""The chunkwise gated delta rule on the GPU, forward: ``intra_chunk`` for all chunks at once, then one scan.

**scan_kernel**. One program owns a (sequence, value head, tile of ``BV`` value columns) and carries its tile of the
state in fp32 registers from chunk to chunk (the columns of the state never meet). Everything is transposed, values
first::

    V'^T = V^T T^T - (exp(c) * (S^T K^T)) T^T     O^T = scale * exp(c) * (S^T Q^T) + V'^T P^T
    S^T <- exp(c_C) S^T + (exp(c_C - c) * V'^T) K

because then the left operand of a product in the chain ``S^T K^T -> V'^T -> S^T`` is what the product before it left in
registers, scaled, and every other operand a tile as it was loaded: nothing on the way passes shared memory. The loads
of the next chunks are in flight meanwhile. The backward runs the same scan with ``states`` and
``written`` (the state before each chunk, and V') in place of ``o``. With few heads a program owns a segment of the
sequence instead (``segments.py``).

The textbook's ``W = T (exp(c) * K)`` and ``U = T V`` make a chain of two products, but cost a kernel that writes as
much as q, k, v and o together, and a scan that reads it: docs/kernels.md has both measured.

Heads narrower than a tensor core's tile (16) are computed in fp32, and 16-bit features are padded to multiples of 16,
which keeps every row on a 16-byte boundary. A few tokens are the recurrent kernel's, unless their bits must be those
that they have in company (``batch_invariance.py``). On Hopper both may be those of ``kernels/hopper``.

Same inputs, same bits: no atomics, and a program's order of work depends on its own sequence only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels import hopper
from gdn_ops.kernels.batch_invariance import is_batch_invariant
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, intra_chunk, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.recurrent import recurrent_forward
from gdn_ops.kernels.triton.segments import combine, maps, segment_length

# Tokens that the recurrent kernel takes: one launch, and nothing of a chunk is rounded. With two tokens ``T`` and ``P``
# are six numbers, whose rounding in bf16 does not average out.
FEW = 8


@triton.jit
def _write_zeros(o, begin, end, stride_t, mask_v, C: tl.constexpr, BV: tl.constexpr):
    """Tokens past the last packed sequence belong to none."""
    rows = tl.arange(0, C)
    zeros = tl.zeros([C, BV], dtype=o.dtype.element_ty)
    for start in range(begin, end, C):
        token = start + rows
        tl.store(o[None, :] + token[:, None] * stride_t, zeros, mask=(token < end)[:, None] & mask_v[None, :])


@triton.jit
def scan_segment(
    program,
    q,
    k,
    v,
    transition,
    P,
    from_start,
    to_end,
    o,
    initial_state,
    final_state,
    states,
    written,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t: tl.constexpr,
    stride_q_h,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The work of one program: ``o`` None: not computed (but ``states`` and ``written``). ``initial_state`` is a
    segment's; None: zeros. ``final_state`` is a sequence's, or None. No early return: the backward has it in a branch.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, _, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    rows = tl.arange(0, C)
    square = rows[:, None] * C + rows[None, :]
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_v = in_v < V
    if o is not None:
        if cu_seqlens is not None:
            past = tl.load(cu_seqlens + N)
            if (exists & last & (end == past)) | ((not exists) & (segment == 0)):
                _write_zeros(o + hv * V + in_v, past, T, HV * V, mask_v, C, BV)
    h = hv // (HV // H)
    in_k = tl.arange(0, BK)
    mask_k = in_k < K
    mask_vk = mask_v[:, None] & mask_k[None, :]
    state_offsets = in_v[:, None] + in_k[None, :] * V

    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    here = first_chunk * HV + hv
    transition += here * C * C
    from_start += here * C
    to_end += here * C
    if o is not None:
        scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
        P += here * C * C
        o += ((b * T + begin) * HV + hv) * V
    else:
        states += here * K * V
        written += here * C * V

    if initial_state is None:
        S_vk = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        initial_state += (segment * HV + hv) * K * V
        S_vk = tl.load(initial_state + state_offsets, mask=mask_vk & exists, other=0.0).to(tl.float32)
    length = tl.where(exists, end - begin, 0).to(tl.int32)
    # The decay of a whole chunk is loaded a chunk ahead: its product would wait for it.
    whole = tl.load(from_start + C - 1, mask=length > 0, other=1.0)
    for start in range(0, length, C):
        next_whole = tl.load(from_start + HV * C + C - 1, mask=start + C < length, other=1.0)
        real = rows < length - start
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
        v_cv = tl.load(v + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
        t_cc = tl.load(transition + square)
        grown_c = tl.load(from_start + rows)
        decay_c = tl.load(to_end + rows)
        S_low = S_vk.to(k_ck.dtype)
        u_vc = tl.dot(tl.trans(v_cv), tl.trans(t_cc), input_precision=PRECISION)
        stored_vc = tl.dot(S_low, tl.trans(k_ck), input_precision=PRECISION)
        erased_vc = (stored_vc * -grown_c[None, :]).to(k_ck.dtype)
        new_vc = tl.dot(erased_vc, tl.trans(t_cc), u_vc, input_precision=PRECISION)
        if o is not None:
            q_ck = tl.load(q + rows[:, None] * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
            p_cc = tl.load(P + square)
            o_vc = tl.dot(S_low, tl.trans(q_ck), input_precision=PRECISION) * (grown_c * scale)[None, :]
            o_vc = tl.dot(new_vc.to(p_cc.dtype), tl.trans(p_cc), o_vc, input_precision=PRECISION)
            o_cv = tl.trans(o_vc).to(o.dtype.element_ty)
            tl.store(o + rows[:, None] * (HV * V) + in_v[None, :], o_cv, mask=mask_cv)
            o += C * HV * V
            P += HV * C * C
        else:
            tl.store(states + in_v[:, None] * K + in_k[None, :], S_low, mask=mask_vk)
            new_low = new_vc.to(written.dtype.element_ty)
            tl.store(written + in_v[:, None] * C + rows[None, :], new_low, mask=mask_v[:, None])
            states += HV * K * V
            written += HV * C * V
        decayed_vc = (new_vc * decay_c[None, :]).to(k_ck.dtype)
        S_vk = tl.dot(decayed_vc, k_ck, S_vk * whole, input_precision=PRECISION)
        whole = next_whole
        q += C * stride_q_t
        k += C * stride_k_t
        v += C * stride_v_t
        transition += HV * C * C
        from_start += HV * C
        to_end += HV * C
    if final_state is not None:
        if last & exists:
            tl.store(final_state + (n * HV + hv) * K * V + state_offsets, S_vk, mask=mask_vk)


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    transition,
    P,
    from_start,
    to_end,
    o,
    initial_state,
    final_state,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t: tl.constexpr,
    stride_q_h,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scan_segment(
        tl.program_id(0), q, k, v, transition, P, from_start, to_end, o, initial_state, final_state, None, None,
        cu_seqlens, chunk_offsets, segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h,
        stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h, H, HV, K, V, BK, BV, C, PRECISION,
    )  # fmt: skip


def scan_configuration(x: Tensor, K: int, V: int, heads: int | None) -> dict[str, int]:
    """Tile and launch parameters of a scan over ``x``'s dtype on its device.

    ``heads`` is the number of (segment, value head) pairs, None when it is symbolic. On large chips 64 value columns
    are one warpgroup's product, 128 two warpgroups' that share what they load. Measured on an H100 (``K = V = 128``,
    bf16, 8192 tokens): 32 heads, .33 ms by 64 columns and .41 by 128; 128 heads, .70 and .45. A state of 256 keys by 64
    columns spills 2.5 KB a thread, by 32 columns nothing; and so it is with 128 keys on other chips. With one stage,
    Triton 3.6's code for 16-bit operands is *wrong* on Hopper. fp32 operands are multiplied in registers, which takes
    narrow tiles.
    """
    size, chip = x.element_size(), chip_of(x)
    BK, widest = max(16, triton.next_power_of_2(K)), triton.next_power_of_2(V)
    if size == 4:
        BV, warps = 16, 8
    elif BK > 128:
        BV, warps = (32, 8) if chip.large else (16, 4)
    elif not chip.large:
        BV, warps = 32, 4
    elif widest >= 128 and (heads is None or heads * triton.cdiv(V, 64) > chip.multiprocessors):
        BV, warps = 128, 8
    else:
        BV, warps = 64, 4
    BV = max(16, min(BV, widest))
    stages = max(1, min(3, chip.shared_memory // (CHUNK * (2 * BK + 2 * CHUNK + BV) * size)))
    return {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": stages}


def scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """Launches :func:`scan_kernel` on contiguous outputs and states; ``initial_state`` is that of each segment."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    configuration = scan_configuration(q, K, V, table.heads(HV))
    launch(scan_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, v=v, transition=x.T, P=x.P, from_start=x.from_start, to_end=x.to_end, o=o,
        initial_state=initial_state, final_state=final_state, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def is_narrow(q: Tensor, v: Tensor) -> bool:
    """Whether the heads are narrower than a tensor core's tile: then 16-bit inputs are computed in fp32."""
    return q.element_size() == 2 and min(q.shape[3], v.shape[3]) < 16


def aligned(x: Tensor) -> Tensor:
    """``x [B, T, H, features]`` with features side by side and rows on 16-byte boundaries; 16-bit features are padded.

    A chunk of it spans fewer than 2^31 elements, so that offsets inside one are 32-bit.
    """
    if x.element_size() == 2 and x.shape[-1] % 16 != 0:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    if x.is_contiguous():
        return x
    # The batch's stride last: it may be a symbol, whose remainder would become a guard.
    even = all(stride % 16 == 0 for stride in x.stride()[-2::-1]) and x.storage_offset() % 8 == 0
    return x if x.stride(-1) == 1 and even and x.stride(1) <= 2**24 else x.contiguous()


def two_tokens(x: Tensor) -> Tensor:
    """``x [B, 1, ...]`` and a token of zeros, which changes nothing: it writes nothing and decays nothing.

    A length of one is a constant to Triton, which then drops the loop over chunks; version 3.6's code for what remains
    reads shared memory out of range on Hopper.
    """
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))


def aligned_state(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor | None:
    """A contiguous state of the padded heads."""
    if state is None:
        return None
    padding = (0, v.shape[3] - state.shape[3], 0, q.shape[3] - state.shape[2])
    return torch.nn.functional.pad(state, padding) if any(padding) else state.contiguous()


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``o [B, T, HV, V]`` in v's dtype and ``final_state [N, HV, K, V]`` in fp32 (no rows unless asked for)."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rest = (initial_state, cu_seqlens, scale, output_final_state)
    if isinstance(T, int) and 0 < T <= FEW and not is_batch_invariant():
        return recurrent_forward(q, k, v, g, beta, *rest)
    if isinstance(T, int) and T == 1:
        o, final_state = chunk_forward(*map(two_tokens, (q, k, v, g, beta)), *rest)
        return o[:, :1].contiguous(), final_state
    if is_narrow(q, v):
        wide = (x.to(torch.float32) for x in (q, k, v))
        o, final_state = chunk_forward(*wide, g, beta, *rest)
        return o.to(v.dtype), final_state
    q, k, v = aligned(q), aligned(k), aligned(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = torch.empty(
        (N if output_final_state else 0, HV, q.shape[3], v.shape[3]), dtype=torch.float32, device=v.device
    )
    initial_state = aligned_state(initial_state, q, v)
    if N == 0:
        o.zero_()
    elif isinstance(T, int) and T == 0:
        if output_final_state:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    else:
        on_hopper = hopper.serves(q, k, v, scale, cu_seqlens)
        columns = hopper.NARROW if on_hopper else None
        table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens, columns=columns))
        final = final_state if output_final_state else None
        parts = hopper.parts(q, v, table) if on_hopper else [table.chunks]
        if len(parts) > 1:
            from gdn_ops.kernels.hopper.narrow_scan import narrow_scan_by_parts

            outputs = {"o": o, "initial_state": initial_state, "final_state": final}
            narrow_scan_by_parts(parts, q, k, v, g, beta, scale, table, **outputs)
        else:
            if on_hopper:  # loaded where they serve: another version of Triton may not have what they need
                from gdn_ops.kernels.hopper.invert import invert
                from gdn_ops.kernels.hopper.maps import maps as map_forth
                from gdn_ops.kernels.hopper.narrow_scan import narrow_scan
                from gdn_ops.kernels.hopper.scan import scan as wide_scan

                run = narrow_scan if hopper.has_room(q, v, table) else wide_scan
                x = invert(k, g, beta, table)
            else:
                run, map_forth, x = scan, maps, intra_chunk(q, k, g, beta, table, scale)
            if table.segment is not None:
                forth = map_forth(x, k, v, table, initial_state)
                initial_state = combine(forth, initial_state, final, q, T, table, reverse=False)
            run(x, q, k, v, scale, table, o=o, initial_state=initial_state, final_state=final)
    return o[..., :V].contiguous(), final_state[:, :, :K, :V].contiguous()


def stays_whole(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> bool:
    """Whether a compiled graph leaves this call of ``chunk_forward`` as it is."""
    return hopper.serves_whole(q, v, cu_seqlens, gradients=False)


def ahead_of_time_inputs(dtype: torch.dtype, H: int, HV: int, K: int, V: int, packed: bool) -> tuple:
    """Tensors without storage for ``chunk_forward`` at one shape."""
    T, N = 4096, 3 if packed else 1

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    state = empty(N, HV, K, V, dtype=torch.float32)
    cu_seqlens = empty(N + 1, dtype=torch.int32) if packed else None
    gates = empty(1, T, HV, dtype=torch.float32)
    return empty(1, T, H, K), empty(1, T, H, K), empty(1, T, HV, V), gates, gates, state, cu_seqlens


AHEAD_OF_TIME = (
    ("bf16", torch.bfloat16, 2, 4, 128, 128, False),
    ("bf16 packed", torch.bfloat16, 2, 2, 64, 64, True),
    ("fp16 wide", torch.float16, 2, 2, 256, 512, False),
    ("fp32 odd", torch.float32, 1, 2, 100, 72, True),
)


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        cases += cases_of_call(f"chunk_forward {name}", chunk_forward, *ahead_of_time_inputs(*shape), 0.1, True)
    return cases
