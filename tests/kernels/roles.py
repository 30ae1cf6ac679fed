"""What racecheck says of warps with roles where nothing is shared, to hold its reports on Gluon kernels against:

    compute-sanitizer --tool racecheck python -m tests.kernels.roles

Triton hands each warp the number of its role through shared memory, behind a barrier of the whole block, and the end
of the kernel likewise. A role has barriers of its own between the two; once it has passed one (``barriers``), racecheck
takes the hand-over for a race: a read at the kernel's first instructions and a write, both on the line of its ``def``
or of ``warp_specialize``. Without barriers it reports nothing. ``roles_kernel`` shares no memory of its own.

``handed_kernel`` has two warpgroups leave a vector each for a warp, behind mbarriers. Each is twice the one before plus
one, so a value handed over too soon would be seen; none is. Where each number is written by one thread, racecheck has
nothing to say of them. Where four threads write the same number to the same place, as Triton stores what a sum over
columns has left, it reports every read. ``hopper_gradient_kernel`` therefore has one thread write one number.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

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


@gluon.jit
def _leave(shared, full, free, rounds, part: gl.constexpr, WRITERS: gl.constexpr):
    at = gl.arange(0, 128, gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32 // WRITERS, WRITERS], [4, 1], [1, 0])))
    value = at + part
    for n in range(rounds):
        mbarrier.wait(free, (n & 1) ^ 1)
        shared.index(part).store(value)
        mbarrier.arrive(full, count=1)
        value = value * 2 + 1


@gluon.jit
def _read(x, shared, full, free, rounds):
    plain: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    at = gl.arange(0, 128, plain)
    for n in range(rounds):
        mbarrier.wait(full, n & 1)
        value = shared.index(0).load(plain) + shared.index(1).load(plain)
        gl.store(x + n * 128 + at, value)
        barrier()
        mbarrier.arrive(free, count=1)


@gluon.jit
def handed_kernel(x, rounds, WRITERS: gl.constexpr):
    x += gl.program_id(0) * rounds * 128
    shared = gl.allocate_shared_memory(gl.int32, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=2)
    mbarrier.init(free, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_leave, (shared, full, free, rounds, 0, WRITERS)),
            (_leave, (shared, full, free, rounds, 1, WRITERS)),
            (_read, (x, shared, full, free, rounds)),
        ],
        [4, 1],
        [64, 24],
    )


def handed(rounds: int, programs: int) -> torch.Tensor:
    at = torch.arange(128)
    rows = [2 * at + 1]
    for _ in range(rounds - 1):
        rows.append(rows[-1] * 2 + 2)
    return torch.stack(rows).to(torch.int32).expand(programs, rounds, 128)


def main() -> None:
    for barriers in (0, 20):
        x = torch.zeros(64, 384, dtype=torch.int32, device="cuda")
        roles_kernel[(64,)](x, barriers, num_warps=4, maxnreg=64)
        print(f"{barriers} barriers: {x.sum().item()}", flush=True)
    for writers in (1, 4):
        x = torch.zeros(64, 10, 128, dtype=torch.int32, device="cuda")
        handed_kernel[(64,)](x, 10, writers, num_warps=4, maxnreg=64)
        print(f"{writers} write the same: {torch.equal(x.cpu(), handed(10, 64))}", flush=True)


if __name__ == "__main__":
    main()
