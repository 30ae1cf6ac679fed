"""The problems that are timed, and what each costs at the least: bytes to move and products to compute."""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# The directions that decode, and in what the state is stored; the arithmetic is fp32 in both.
STATE_DTYPES = {"decode": torch.float32, "decode, bf16 state": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward", *STATE_DTYPES)


class Shape(NamedTuple):
    """``N`` sequences of ``T`` tokens, ``H`` key heads of width ``K``, ``HV`` value heads of width ``V``."""

    H: int
    HV: int
    N: int
    T: int
    K: int = 128
    V: int = 128

    def __str__(self) -> str:
        width = "" if self.K == self.V == 128 else f" K={self.K} V={self.V}"
        return f"{self.H}/{self.HV} {self.N}x{self.T}{width}"


def parse_shape(text: str) -> Shape:
    """``"16,32,1,8192,128,128"`` to a :class:`Shape`; raises ValueError naming what is wrong."""
    parts = text.split(",")
    if len(parts) != 6 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape: expected six positive integers H,HV,N,T,K,V, got {text!r}")
    shape = Shape(*map(int, parts))
    if shape.HV % shape.H:
        raise ValueError(f"shape: expected HV divisible by H, got {shape.HV} and {shape.H}")
    return shape


# The first row of each is the one to look at; a short budget measures the first rows first.
FORWARD = [
    Shape(16, 32, 1, 8192), Shape(2, 8, 1, 8192), Shape(2, 8, 1, 32768), Shape(16, 32, 1, 32768),
    Shape(16, 32, 4, 8192), Shape(4, 16, 1, 8192), Shape(16, 16, 1, 8192), Shape(32, 32, 1, 8192),
    Shape(16, 64, 1, 8192), Shape(16, 64, 4, 8192), Shape(16, 64, 8, 1024), Shape(16, 16, 8, 4096),
]  # fmt: skip
BACKWARD = [
    Shape(16, 32, 1, 8192), Shape(16, 32, 1, 32768), Shape(8, 16, 1, 8192), Shape(8, 16, 1, 32768),
    Shape(4, 8, 1, 32768), Shape(2, 4, 1, 8192), Shape(2, 4, 1, 32768),
]  # fmt: skip
DECODE = [Shape(16, 32, 64, 1), Shape(16, 32, 1, 1), Shape(16, 32, 256, 1)]
LONG = [Shape(16, 32, 1, 1024 * 4**i) for i in range(6)]  # to 1,048,576 tokens, where q, k, v and o are 26 GB
SUITES = {
    "forward": [(shape, "forward") for shape in FORWARD],
    "backward": [(shape, "backward") for shape in BACKWARD] + [(BACKWARD[0], "forward+backward")],
    "decode": [(shape, "decode") for shape in DECODE]
    + [(shape, "decode, bf16 state") for shape in DECODE if shape.N > 1],  # one sequence shows the launch alone
    "long": [(shape, "forward") for shape in LONG],
}


class Cost(NamedTuple):
    bytes: int
    flops: int


def cost(shape: Shape, direction: str, dtype: torch.dtype) -> Cost:
    """The least traffic, every input read once and every output written once, and the products of the chunk form.

    Gates do not count; the state, in the dtype it is stored in, counts for decode alone, where it is the traffic.
    ``backward`` computes again whatever the forward would have had to store. A multiplication and an addition are two.
    """
    H, HV, N, T, K, V = shape
    tokens, size, C = N * T, dtype.itemsize, CHUNK
    inputs, outputs = tokens * (2 * H * K + HV * V) * size, tokens * HV * V * size
    forward = 2 * tokens * HV * (3 * C * K + 2 * C * V + C * C // 3 + 3 * K * V)
    backward = 2 * tokens * HV * (5 * C * K + 5 * C * V + C * C // 3 + 8 * K * V)
    if direction in STATE_DTYPES:
        state = N * HV * K * V * STATE_DTYPES[direction].itemsize
        return Cost(inputs + outputs + 2 * state, 6 * tokens * HV * K * V)
    if direction == "forward":
        return Cost(inputs + outputs, forward)
    if direction == "backward":
        return Cost(2 * inputs + outputs, backward)
    if direction == "forward+backward":
        return Cost(3 * inputs + 2 * outputs, forward + backward)
    raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")


class Inputs(NamedTuple):
    """One set of inputs; ``state`` is fp32 ``[N, HV, K, V]``, whatever a direction stores it in; ``do`` the gradient of
    the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    state: torch.Tensor
    do: torch.Tensor
    scale: float


# Normal numbers made at once, a gibibyte in fp32: the values of a million tokens would be 17 GB of it.
PART = 2**28


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Unit queries and keys; gates as a layer of the paper starts with: ``-A * dt``, A in (0, 16), dt in [.001, .1]."""
    H, HV, N, T, K, V = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device)

    def tokens(heads: int, width: int, unit: bool = False) -> torch.Tensor:
        x = torch.empty(N, T, heads, width, dtype=dtype, device=device)
        for part in x.flatten(0, 1).split(max(1, PART // (heads * width))):
            numbers = normal(*part.shape)
            part.copy_(torch.nn.functional.normalize(numbers, dim=-1) if unit else numbers)
        return x

    g = -16 * uniform(HV) * 10 ** (2 * uniform(N, T, HV) - 3)
    state = normal(N, HV, K, V) if T == 1 else torch.zeros(N, HV, K, V, device=device)
    q, k, v = tokens(H, K, unit=True), tokens(H, K, unit=True), tokens(HV, V)
    beta = uniform(N, T, HV)
    return Inputs(q, k, v, g, beta, state, tokens(HV, V), K**-0.5)
