"""The rules in operators of opset 18, all fp32: the local functions ``gdn_ops::GatedDeltaRule`` and, the same without
beta and with ``V' = V``, ``gdn_ops::GatedLinearAttention``.

One token (decode) has a branch of its own. Longer input is a ``Scan`` over chunks of ``CHUNK`` tokens; the tokens that
the last chunk lacks are copies of the last one with ``g = beta = 0``, which change no state. T is at least 1: runtimes
do not loop over nothing, and a second branch for it makes ONNX Runtime 1.32 crash where sizes are fixed. The branch for
one token takes the first of any number: TensorRT works out the shapes of both branches at any length. Inside a
chunk, with ``c = cumsum(g)`` and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)      M = (I + A)^-1 diag(beta)      P = scale * (Q K^T) * D
    V' = M (V - (exp(c) * K) S)                   O = scale * (exp(c) * Q) S + P V'
    S <- exp(c_C) S + (exp(c_C - c) * K)^T V'

Nothing is ever divided by a decay. The exponents ``c_i - c_j`` are one product of the gates with a 0/1 matrix that
picks the gates between j and i: no difference of two large sums is formed, so that fp32 is enough after a strong gate.
Gates below ``WEAKEST`` (-inf among them) are an exact zero in fp32 and are raised to it first, since 0 * inf is not a
number. The inverse grows by doubling: with ``X`` the inverse of the diagonal blocks of size b, ``X - X (A * mask) X``
is that of size 2b, where the mask leaves the blocks between; repeated keys stay accurate, as they do in substitution.

What is as large as q, k or v is made inside the loop, where it stays in the caches and long prompts need no more
memory; gates and row numbers, a hundredth of that, are made for all chunks before it, in a few nodes instead of a few
a chunk. Tokens are picked head by head by row number, which is one copy where a slice, padding and a transposition
would be three. The state keeps its own shape outside the loop: a Reshape in front of an output is a copy. Chunks of 32
are the fastest (H=16, HV=32, K=V=128; 64 takes a tenth longer at T=1024). Products of one row read the state without
packing it, so decode asks for k and q apart; it scales q some nodes before its product, for ONNX Runtime fuses a scale
that is next to a product of one row into a kernel half as fast. Layouts inside:
``[B, H, G, C, width]`` with ``G = HV // H`` value heads to a key head, over which products broadcast. Source of the
algorithm: arXiv 2412.06464, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ops.lowering.onnx.function import function

if TYPE_CHECKING:
    from onnx import FunctionProto

CHUNK, BLOCK = 32, 16
WEAKEST = -1000.0
# Added to an exponent above the diagonal: exp gives an exact zero, and a gate that is no number still shows.
NEVER = -1.0e6


_TOKEN = """
  q_scaled = Mul (q, scale)
  q_first = Gather <axis = 1> (q_scaled, first0)
  k_first = Gather <axis = 1> (k, first0)
  v_first = Gather <axis = 1> (v, first0)
  g_first = Gather <axis = 1> (g, first0)
  key_head_of = Div (value_heads, G)
  q_each = Gather <axis = 1> (q_first, key_head_of)
  k_each = Gather <axis = 1> (k_first, key_head_of)
  q1 = Unsqueeze (q_each, two)
  k1_T = Unsqueeze (k_each, three)
  v1 = Unsqueeze (v_first, two)
  decay_each = Exp (g_first)
  decay = Unsqueeze (decay_each, last_axes)
  kept = Mul (initial_state, decay)
{written}
  added = Mul (k1_T, written)
  S_token = Add (kept, added)
  o1 = MatMul (q1, S_token)
  o_first = Transpose <perm = [0, 2, 1, 3]> (o1)
  o_shape = Shape (v)
  o_token = Expand (o_first, o_shape)
"""

_TOKEN_DELTA = """
  beta_first = Gather <axis = 1> (beta, first0)
  beta1 = Unsqueeze (beta_first, last_axes)
  k1 = Unsqueeze (k_each, two)
  k_S = MatMul (k1, kept)
  missing = Sub (v1, k_S)
  written = Mul (missing, beta1)
"""

_CHUNK = """
  q_h = Gather <axis = 0> (q_rows, key_rows)
  k_h = Gather <axis = 0> (k_rows, key_rows)
  v_h = Gather <axis = 0> (v_rows, value_rows)
  kc = Unsqueeze (k_h, two)
  vc = Reshape (v_h, value_chunk)
  exponent = MatMul (g_one, between)
  D_flat = Exp (exponent)
  D = Reshape (D_flat, pairs)
  k_T = Transpose <perm = [0, 1, 2, 4, 3]> (kc)
  S = Reshape (S_before, grouped)
{written}
  k_end = Mul (kc, to_end)
  k_end_T = Transpose <perm = [0, 1, 2, 4, 3]> (k_end)
  kept = Mul (S_before, whole)
  added_grouped = MatMul (k_end_T, written)
  added = Reshape (added_grouped, state_shape)
  S_after = Add (kept, added)
  own_plain = MatMul (P, written)
  own = Mul (own_plain, scale)
  o_c = Add (q_S, own)
"""

_CHUNK_DELTA = """
  kq_h = Concat <axis = 2> (k_h, q_h)
  kq = Unsqueeze (kq_h, two)
  kq_k = MatMul (kq, k_T)
  kk, qk = Split <axis = 3, num_outputs = 2> (kq_k)
  kk_D = Mul (kk, D)
  A = Mul (kk_D, beta_col)
  P = Mul (qk, D)
{inverse}
  M = Mul (X, beta_row)
  kq_start = Mul (kq, from_start)
  kq_S = MatMul (kq_start, S)
  k_S, q_S = Split <axis = 3, num_outputs = 2> (kq_S)
  missing = Sub (vc, k_S)
  written = MatMul (M, missing)
"""

_CHUNK_LINEAR = """
  qc = Unsqueeze (q_h, two)
  qk = MatMul (qc, k_T)
  P = Mul (qk, D)
  q_start = Mul (qc, from_start)
  q_S = MatMul (q_start, S)
  written = Identity (vc)
"""

# Of all chunks: the gates of each, and which row of q, k and v each of its tokens is, head by head.
_CHUNKS = """
  C = Constant <value_ints = [{C}]> ()
  last_token = Constant <value_ints = [{last}]> ()
  minus_one = Constant <value_ints = [-1]> ()
{masks}
  B0 = Squeeze (B)
  H0 = Squeeze (H)
  T0 = Squeeze (T)
  rounded = Add (T, last_token)
  n = Div (rounded, C)
  T_padded = Mul (n, C)
  end = Squeeze (T_padded)
  position_flat = Range (first0, end, one0)
  in_chunks = Concat <axis = 0> (n, C)
  position = Reshape (position_flat, in_chunks)
  last = Sub (T0, one0)
  tokens = Min (position, last)
  tokens_u = Unsqueeze (tokens, deep)
  b = Range (first0, B0, one0)
  batch_first = Mul (b, T)
  batch_row = Unsqueeze (batch_first, deep)
  token_row = Add (tokens_u, batch_row)
  key_row = Mul (token_row, H)
  value_row = Mul (token_row, HV)
  key_heads = Range (first0, H0, one0)
  key_head = Unsqueeze (key_heads, down)
  value_head = Unsqueeze (value_heads, down)
  key_rows_n = Add (key_row, key_head)
  value_rows_n = Add (value_row, value_head)

  value_chunk = Concat <axis = 0> (B, H, G, C, V)
  pairs = Concat <axis = 0> (B, H, G, C, C)
  gate_cols = Concat <axis = 0> (n, B, H, G, C, one)
  is_real = Less (position, T0)
  real_f = Cast <to = 1> (is_real)
  real = Unsqueeze (real_f, deep)
  g_t = Gather <axis = 1> (g, tokens)
  g_h = Transpose <perm = [1, 0, 3, 2]> (g_t)
  gc = Mul (g_h, real)
  one_more = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 1]> ()
  g_one_n = Pad (gc, one_more, one_f)
  c = MatMul (gc, until)
  c_exp = Exp (c)
  start = Reshape (c_exp, gate_cols)
  start_scaled = Mul (start, scale)
  c_last = Slice (c_exp, last_token, C, minus_one)
  whole_n = Unsqueeze (c_last, minus_one)
  rest = MatMul (gc, after)
  rest_exp = Exp (rest)
{gates}
  q_rows_shape = Concat <axis = 0> (minus_one, K)
  v_rows_shape = Concat <axis = 0> (minus_one, V)
  q_rows = Reshape (q, q_rows_shape)
  k_rows = Reshape (k, q_rows_shape)
  v_rows = Reshape (v, v_rows_shape)
  grouped = Concat <axis = 0> (B, H, G, K, V)
  state_shape = Concat <axis = 0> (B, HV, K, V)
  S_chunks, o_stacked = Scan (
    initial_state, key_rows_n, value_rows_n, g_one_n, from_start_n, to_end_n, whole_n{more})
    <num_scan_inputs = {scanned}, body = chunk (
      float[B, HV, K, V] S_before, int64[B, H, C] key_rows, int64[B, HV, C] value_rows, float[B, HV, C1] g_one,
      float[B, H, G, C2, one] from_start, float[B, H, G, C, one] to_end, float[B, HV, one, one] whole{typed}
    ) => (float[B, HV, K, V] S_after, float[B, H, G, C, V] o_c) {{{chunk}}}>
  t = Range (first0, T0, one0)
  t_chunk = Div (t, C)
  t_rest = Mod (t, C)
  chunk_batch = Mul (t_chunk, B)
  b0 = Unsqueeze (b, down)
  chunk_row = Add (chunk_batch, b0)
  head_row = Mul (chunk_row, HV)
  head_row_u = Unsqueeze (head_row, two)
  head_rows = Add (head_row_u, value_heads)
  first_row = Mul (head_rows, C)
  t_rest_u = Unsqueeze (t_rest, down)
  o_row = Add (first_row, t_rest_u)
  o_rows = Reshape (o_stacked, v_rows_shape)
  o_chunks = Gather <axis = 0> (o_rows, o_row)
"""

_GATES_DELTA = """
  beta_t = Gather <axis = 1> (beta, tokens)
  beta_h = Transpose <perm = [1, 0, 3, 2]> (beta_t)
  beta_c = Mul (beta_h, real)
  gate_rows = Concat <axis = 0> (n, B, H, G, one, C)
  beta_col_n = Reshape (beta_c, gate_cols)
  beta_row_n = Reshape (beta_c, gate_rows)
  from_start_n = Concat <axis = 4> (start, start_scaled)
  to_end_n = Reshape (rest_exp, gate_cols)
"""

_GATES_LINEAR = """
  from_start_n = Identity (start_scaled)
  rest_real = Mul (rest_exp, real)
  to_end_n = Reshape (rest_real, gate_cols)
"""

_MASKS = """
  C0 = Constant <value_int = {C}> ()
  index = Range (first0, C0, one0)
  across = Constant <value_ints = [0]> ()
  down = Constant <value_ints = [1]> ()
  deep = Constant <value_ints = [1, 2]> ()
  j = Unsqueeze (index, across)
  i = Unsqueeze (index, down)
  l = Unsqueeze (index, deep)
  from_j = Greater (l, j)
  to_i = LessOrEqual (l, i)
  between_b = And (from_j, to_i)
  between_f = Cast <to = 1> (between_b)
  between_shape = Constant <value_ints = [{C}, {CC}]> ()
  between_gates = Reshape (between_f, between_shape)
  until_b = LessOrEqual (i, j)
  until = Cast <to = 1> (until_b)
  after_b = Greater (i, j)
  after = Cast <to = 1> (after_b)
  lower = GreaterOrEqual (i, j)
  nothing = Constant <value_float = 0.0> ()
  strongest = Constant <value_float = {NEVER}> ()
  never_square = Where (lower, nothing, strongest)
  never_shape = Constant <value_ints = [1, {CC}]> ()
  never = Reshape (never_square, never_shape)
  between = Concat <axis = 0> (between_gates, never)
  one_f = Constant <value_float = 1.0> ()
"""

_BLOCKS = """
  minus_three = Constant <value_ints = [-3]> ()
  block0 = Constant <value_int = {block}> ()
  index_block = Range (first0, block0, one0)
  j_block = Unsqueeze (index_block, across)
  i_block = Unsqueeze (index_block, down)
  diagonal_b = Equal (i_block, j_block)
  diagonal = Cast <to = 1> (diagonal_b)
"""

_MASK = """
  size{n} = Constant <value_int = {size}> ()
  i{n} = Div (i_block, size{n})
  j{n} = Div (j_block, size{n})
  size2{n} = Constant <value_int = {double}> ()
  i2{n} = Div (i_block, size2{n})
  j2{n} = Div (j_block, size2{n})
  together{n} = Equal (i2{n}, j2{n})
  below{n} = Greater (i{n}, j{n})
  mask_b{n} = And (together{n}, below{n})
  mask{n} = Cast <to = 1> (mask_b{n})
"""

_DOUBLING = """
  A_{n} = Mul ({A}, mask{n})
  XA_{n} = MatMul (X_{before}, A_{n})
  XAX_{n} = MatMul (XA_{n}, X_{before})
  X_{n} = Sub (X_{before}, XAX_{n})
"""


def _inverse(chunk: int, block: int) -> tuple[str, str]:
    """Text that makes ``X``, the inverse of ``I + strict_lower(A)``, and text of the constants that it needs.

    Blocks of ``block`` tokens by masked doubling, all at once; beyond that, half by half:
    ``[[X1, 0], [-X2 A21 X1, X2]]``.
    """
    constants, before, after = "", "", ""
    A, size = "A", chunk
    while size > block:
        half = size // 2
        constants += f"""
  lo{half} = Constant <value_ints = [0, 0]> ()
  mid{half} = Constant <value_ints = [{half}, {half}]> ()
  end{half} = Constant <value_ints = [{size}, {size}]> ()
  lowleft{half} = Constant <value_ints = [{half}, 0]> ()
  lowright{half} = Constant <value_ints = [{size}, {half}]> ()
"""
        before += f"""
  A1_{half}_m = Slice ({A}, lo{half}, mid{half}, last_axes)
  A2_{half}_m = Slice ({A}, mid{half}, end{half}, last_axes)
  A21_{half} = Slice ({A}, lowleft{half}, lowright{half}, last_axes)
  A1_{half} = Unsqueeze (A1_{half}_m, minus_three)
  A2_{half} = Unsqueeze (A2_{half}_m, minus_three)
  A_{half}_halves = Concat <axis = -3> (A1_{half}, A2_{half})
"""
        after = (
            f"""
  X1_{half}_u, X2_{half}_u = Split <axis = -3, num_outputs = 2> (X{half})
  X1_{half} = Squeeze (X1_{half}_u, minus_three)
  X2_{half} = Squeeze (X2_{half}_u, minus_three)
  X2A_{half} = MatMul (X2_{half}, A21_{half})
  X2AX1_{half} = MatMul (X2A_{half}, X1_{half})
  X21_{half} = Neg (X2AX1_{half})
  X12_{half} = Mul (X1_{half}, nothing)
  top_{half} = Concat <axis = -1> (X1_{half}, X12_{half})
  bottom_{half} = Concat <axis = -1> (X21_{half}, X2_{half})
  X{size} = Concat <axis = -2> (top_{half}, bottom_{half})
"""
            + after
        )
        A, size = f"A_{half}_halves", half
    levels = size.bit_length() - 1
    middle = f"  A_0 = Mul ({A}, mask0)\n  X_0 = Sub (diagonal, A_0)\n"
    middle += "".join(_DOUBLING.format(A=A, n=n, before=n - 1) for n in range(1, levels))
    middle += f"  X{size} = Identity (X_{levels - 1})\n"
    constants += "".join(_MASK.format(n=n, size=1 << n, double=2 << n) for n in range(levels))
    return before + middle + after + f"  X = Identity (X{chunk})\n", constants


_RULE = """
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  last_axes = Constant <value_ints = [-2, -1]> ()
  first0 = Constant <value_int = 0> ()
  one0 = Constant <value_int = 1> ()
  B = Shape <start = 0, end = 1> (q)
  T = Shape <start = 1, end = 2> (q)
  H = Shape <start = 2, end = 3> (q)
  K = Shape <start = 3, end = 4> (q)
  HV = Shape <start = 2, end = 3> (v)
  V = Shape <start = 3, end = 4> (v)
  G = Div (HV, H)
  HV0 = Squeeze (HV)
  value_heads = Range (first0, HV0, one0)
  scale = Constant <value_float: float = @scale> ()
  weakest = Constant <value_float = {WEAKEST}> ()
  g = Max (g_in, weakest)
  is_token = Equal (T, one)
  is_token0 = Squeeze (is_token)
  o, final_state = If (is_token0) <
    then_branch = token () => (float[B, T, HV, V] o_token, float[B, HV, K, V] S_token) {{{token}}},
    else_branch = chunks () => (float[B, T, HV, V] o_chunks, float[B, HV, K, V] S_chunks) {{{chunks}}}
  >
"""


def rule(chunk: int = CHUNK, block: int = BLOCK) -> FunctionProto:
    """``gdn_ops::GatedDeltaRule <scale> (q, k, v, g, beta, initial_state) => (o, final_state)``, all fp32.

    ``chunk`` is the length of a chunk and ``block`` that of the blocks that are inverted by doubling, powers of two.
    """
    for name, size in (("chunk", chunk), ("block", block)):
        if size < 2 or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two from 2, got {size}")
    block = min(block, chunk)
    inverse, constants = _inverse(chunk, block)
    signature = "GatedDeltaRule <scale> (q, k, v, g_in, beta, initial_state) => (o, final_state)"
    constants = _BLOCKS.format(block=block) + constants
    scanned = {"beta_col": "float[B, H, G, C, one]", "beta_row": "float[B, H, G, one, C]"}
    body = _body(chunk, _TOKEN_DELTA, _CHUNK_DELTA.format(inverse=inverse), constants + _GATES_DELTA, scanned)
    return function(signature, body)


def linear_rule(chunk: int = CHUNK) -> FunctionProto:
    """``gdn_ops::GatedLinearAttention <scale> (q, k, v, g, initial_state) => (o, final_state)``, all fp32."""
    signature = "GatedLinearAttention <scale> (q, k, v, g_in, initial_state) => (o, final_state)"
    return function(signature, _body(chunk, "  written = Identity (v1)\n", _CHUNK_LINEAR, _GATES_LINEAR, {}))


def _body(chunk: int, token_written: str, chunk_written: str, gates: str, scanned: dict[str, str]) -> str:
    """The text of a rule, given how a token and a chunk make what they write (and what they read), and what a chunk
    ``scanned`` for it beside the gates."""
    chunks = _CHUNKS.format(
        C=chunk,
        last=chunk - 1,
        masks=_MASKS.format(C=chunk, CC=chunk * chunk, NEVER=NEVER),
        gates=gates,
        more="".join(f", {name}_n" for name in scanned),
        typed="".join(f", {kind} {name}" for name, kind in scanned.items()),
        scanned=6 + len(scanned),
        chunk=_CHUNK.format(written=chunk_written),
    )
    return _RULE.format(WEAKEST=WEAKEST, token=_TOKEN.format(written=token_written), chunks=chunks)
