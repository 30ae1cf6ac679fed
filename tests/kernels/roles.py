"""What racecheck says of warps with roles where nothing is shared, to hold its reports on Gluon kernels against:

    compute-sanitizer --tool racecheck python -m tests.kernels.roles

Triton hands each warp the number of its role through shared memory, behind a barrier of the whole block, and the end
of the kernel likewise. A role has barriers of its own between the two; once it has passed one (``barriers``), racecheck
takes the hand-over for a race: a read at the kernel's first instructions and a write, both on the line of its ``def``
or of ``warp_specialize``. Without barriers it reports nothing. The two kernels here share no memory of their own.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.jit
def _role(x, n: gl.constexpr, WARPS: gl.constexpr, BARRIERS: gl.constexpr):
    if WARPS > 1:
        for _ in range(BARRIERS):
            barrier()
    at = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(x + n * 128 + at, at * 0 + n)


@gluon.jit
def roles_kernel(x, BARRIERS: gl.constexpr):
    x += gl.program_id(0) * 384
    gl.warp_specialize(
        [(_role, (x, 0, 4, BARRIERS)), (_role, (x, 1, 4, BARRIERS)), (_role, (x, 2, 1, BARRIERS))], [4, 1], [64, 24]
    )


def main() -> None:
    for barriers in (0, 20):
        x = torch.zeros(64, 384, dtype=torch.int32, device="cuda")
        roles_kernel[(64,)](x, barriers, num_warps=4, maxnreg=64)
        print(f"{barriers} barriers: {x.sum().item()}", flush=True)


if __name__ == "__main__":
    main()
