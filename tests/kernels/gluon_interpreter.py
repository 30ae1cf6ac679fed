"""Runs the Gluon kernels for Hopper on the CPU, which Triton's interpreter does not.

The Python source of a kernel is executed as it stands, with other things behind the names that it uses: values are
torch tensors, pointers and descriptors are tensors with an offset or a tile, shared memory is bytes in the order of its
swizzled layout, and each role of ``warp_specialize`` is a thread. What it shows: arithmetic, indices, bounds, tiles,
which bytes a reinterpreted tile is made of, and that the barriers of all roles fit together (a role that waits for 30
seconds is an error). Products and copies are over at once, but what they read may not change before they have been
waited for, which takes its time. What it does not show: other races, layouts, fences, what the compiler makes of it,
and PTX, in whose place other functions stand (``PTX``).
"""

from __future__ import annotations

import inspect
import math
import random
import threading
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton.experimental.gluon.language as real_gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gdn_ops.kernels import hopper
from gdn_ops.kernels.hopper import both_ways, gradients, invert, maps, narrow_scan, scan
from gdn_ops.kernels.triton.chip import CHIPS, as_if_on

PATIENCE = 30.0  # seconds
DTYPES = ("float32", "float64", "bfloat16", "int32", "int64")


class Value(torch.Tensor):
    """A tensor of a kernel. It never changes: ``x += 1`` makes another one, where another role may have this one."""

    __iadd__, __isub__, __imul__, __ixor__ = (
        torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__, torch.Tensor.__xor__,
    )  # fmt: skip

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return self.view(dtype) if bitcast else torch.Tensor.to(self, dtype)

    def split(self) -> tuple[Value, ...]:
        return self.unbind(-1)


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    def __init__(self, memory: Tensor, at=0) -> None:
        self.memory, self.at, self.dtype = memory, at, SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def _where(self, mask) -> tuple[Tensor, Tensor]:
        """Positions that exist, and the mask. What is masked out may point anywhere."""
        at = torch.as_tensor(self.at)
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(True if mask is None else mask))
        at = torch.where(mask, at, 0).as_subclass(Tensor)
        assert at.numel() == 0 or 0 <= at.min() <= at.max() < self.memory.numel(), "an access outside the tensor"
        return at, mask.as_subclass(Tensor)

    def load(self, mask=None, other=0.0) -> Value:
        at, mask = self._where(mask)
        return value(torch.where(mask, self.memory[at], torch.as_tensor(other, dtype=self.memory.dtype)))

    def store(self, x, mask=None) -> None:
        at, mask = self._where(mask)
        x = torch.broadcast_to(torch.as_tensor(x), at.shape)[mask].to(self.memory.dtype)
        self.memory[at[mask]] = x.as_subclass(Tensor)


class Descriptor:
    """Tiles of a tensor; zeros are read outside it, and nothing is written there."""

    def __init__(self, of: TensorDescriptor) -> None:
        base, block = of.base, list(of.block_shape)
        self.memory = torch.as_strided(base, list(of.shape), list(of.strides), base.storage_offset())
        self.layout, self.dtype = of.layout, base.dtype
        self.block_type = SimpleNamespace(shape=block, nbytes=math.prod(block) * base.element_size())

    def _parts(self, at) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, tile = [], []
        for first, width, size in zip(map(int, at), self.block_type.shape, self.memory.shape):
            assert first >= 0
            count = max(0, min(width, size - first))
            inside.append(slice(first, first + count))
            tile.append(slice(0, count))
        return tuple(inside), tuple(tile)

    def load(self, at) -> Tensor:
        inside, tile = self._parts(at)
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        block[tile] = self.memory[inside]
        return block

    def store(self, at, block: Tensor) -> None:
        inside, tile = self._parts(at)
        self.memory[inside] = block[tile]


def _in_order(shape: list[int], first: int) -> Tensor:
    """Where the elements of a tile are: blocks of 64 columns (128 bytes of 16 bits), row by row."""
    *rows, columns = shape
    places = torch.arange(first, first + math.prod(shape))
    if columns <= 64:
        return places.view(shape)
    return places.view(columns // 64, math.prod(rows), 64).transpose(0, 1).reshape(shape)


class Shared:
    """A view of shared memory: ``places`` of its elements in ``memory``, fresh NaN."""

    layout = None

    def __init__(self, memory: Tensor, places: Tensor) -> None:
        self.memory, self.places = memory, places

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: list[int], layout) -> Shared:
        rank = getattr(layout, "rank", len(shape))
        count, tile = math.prod(shape[:-rank]) if rank < len(shape) else 1, shape[-rank:]
        size = math.prod(tile)
        places = torch.stack([_in_order(tile, i * size) for i in range(count)]).view(shape)
        return cls(torch.full((count * size,), float("nan"), dtype=dtype), places)

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.places.shape)

    def index(self, i) -> Shared:
        return Shared(self.memory, self.places[int(i)])

    def slice(self, start, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.places.narrow(dim, int(start), length))

    def reshape(self, shape) -> Shared:
        return Shared(self.memory, self.places.reshape(shape))

    def permute(self, order) -> Shared:
        return Shared(self.memory, self.places.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout) -> Shared:
        assert dtype.itemsize == self.dtype.itemsize and math.prod(shape) == self.places.numel()
        return Shared(self.memory.view(dtype), _in_order(shape, int(self.places.min())))

    def _keep_alive(self) -> None:
        pass

    def load(self, layout=None) -> Value:
        return value(self.memory[self.places])

    def store(self, x) -> None:
        assert list(x.shape) == self.shape and x.dtype == self.dtype
        self.memory[self.places] = x.as_subclass(Tensor)


class Barrier:
    changed = threading.Condition()

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def _step(self, arrivals: int, copied: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += copied
            assert self.missing >= 0, "more arrivals than the barrier has"
            if self.missing == self.bytes == 0:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def _keep_alive(self) -> None:
        pass

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 1, pred=True) -> None:
        if pred:
            self._step(count, 0)

    def wait(self, phase, pred=True) -> None:
        if not pred:
            return
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != int(phase), PATIENCE):
                raise TimeoutError("a barrier that nobody completes")


class Barriers(list):
    def index(self, i) -> Barrier:
        return self[int(i)]


def _allocate(dtype, shape: list[int], layout) -> Shared | Barrier | Barriers:
    if isinstance(layout, FakeMBarrier.MBarrierLayout):
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
    return Shared.allocate(dtype, list(shape), layout)


class FakeMBarrier:
    class MBarrierLayout:
        pass

    init = staticmethod(lambda barrier, count: barrier.init(count))
    wait = staticmethod(lambda barrier, phase, pred=True: barrier.wait(phase, pred))
    arrive = staticmethod(lambda barrier, count=1, pred=True: barrier.arrive(count, pred))
    expect = staticmethod(lambda barrier, nbytes: barrier._step(1, nbytes))


class Running(threading.local):
    """Products and stores of a role that may not be over, by what they read."""

    def __init__(self) -> None:
        self.products, self.stores, self.random = [], [], random.Random(0)

    def start(self, kind: list, *operands) -> None:
        kind.append([(x, x.load()) for x in operands if isinstance(x, Shared)])

    def wait(self, kind: list, left: int) -> None:
        """All but the last ``left`` are over; what they read must be what it was when they started."""
        if len(kind) > left:
            time.sleep(0.01 * self.random.random() ** 8)  # mostly none: meanwhile others do what they are let to
        while len(kind) > left:
            for x, before in kind.pop(0):
                if not torch.equal(x.load().view(torch.int16), before.view(torch.int16)):
                    raise RuntimeError("shared memory was written while a product or a store may still read it")


RUNNING = Running()


def _copy_in(tensor: Descriptor, at, barrier: Barrier, tile: Shared) -> None:
    tile.store(tensor.load(at).view(tile.shape))
    barrier._step(0, -tensor.block_type.nbytes)


def _copy_out(tensor: Descriptor, at, tile: Shared) -> None:
    tensor.store(at, tile.load().view(tensor.block_type.shape))
    RUNNING.start(RUNNING.stores, tile)


fake_tma = SimpleNamespace(
    async_copy_global_to_shared=_copy_in,
    async_copy_shared_to_global=_copy_out,
    store_wait=lambda pendings: RUNNING.wait(RUNNING.stores, pendings),
)


def _mma(a, b: Shared, to, use_acc=True, is_async=False) -> Value:
    left, a = a, a.load() if isinstance(a, Shared) else a
    assert a.dtype == b.dtype and a.dtype.itemsize == 2
    product = a.float() @ b.load().float()
    if is_async:
        RUNNING.start(RUNNING.products, left, b)
    return product + to if use_acc else product


def _small_mma(a: Value, b: Value, to: Value) -> Value:
    return a.float() @ b.float() + to


def _invert_16(minus_a: Value) -> Value:
    """Of each block of 16 rows; what is not below its diagonal is zero."""
    blocks = minus_a.double().unflatten(0, (-1, 16))
    return value(torch.linalg.inv(torch.eye(16) - blocks).flatten(0, 1).float())


def _terms(x: Value) -> tuple[Value, Value]:
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def _from_lane(x: Value, lane: Value) -> Value:
    """A lane has two numbers side by side."""
    return x[0, (2 * lane + 1) % x.shape[1]].expand(-1, x.shape[1])


# Functions of invert.py that are PTX.
PTX = {
    "_invert_16": _invert_16,
    "_terms": _terms,
    "_from_lane": _from_lane,
    "_choose": lambda condition, x, y: torch.where(condition != 0, x, y),
    "_reciprocal": torch.reciprocal,
}


def _mma_wait(pendings: int, deps: tuple):
    RUNNING.wait(RUNNING.products, pendings)
    return deps[0] if len(deps) == 1 else deps


def _asm(source: str, constraints: str, arguments: list, dtype, is_pure: bool, pack: int):
    if source.startswith("ex2.approx"):
        return torch.exp2(arguments[0])
    assert "mov.b32 $0" in source
    return value(arguments[0]) if len(arguments) == 1 else tuple(arguments)


def _scan(x: Value, axis: int, combine, reverse: bool = False) -> Value:
    """Sums, the only ones in use."""
    return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)


def _specialize(roles: list[tuple], warps: list[int], registers: list[int]) -> None:
    failures = []

    def run(function, arguments) -> None:
        try:
            function(*arguments)
            assert not RUNNING.products and not RUNNING.stores, "a role ends before its products and stores"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((e for e in failures if not isinstance(e, TimeoutError)), failures[0])


class Language:
    """What kernels call ``gl``. Layouts mean nothing but for shared memory."""

    program, programs = 0, 1
    NVMMASharedLayout = real_gl.NVMMASharedLayout
    SliceLayout = BlockedLayout = DistributedLinearLayout = DotOperandLayout = NVMMADistributedLayout = staticmethod(
        lambda *args, **kwargs: None
    )
    SwizzledSharedLayout = SliceLayout
    allocate_shared_memory = staticmethod(_allocate)
    inline_asm_elementwise = staticmethod(_asm)
    associative_scan = staticmethod(_scan)
    warp_specialize = staticmethod(_specialize)
    static_range = range
    sum = staticmethod(lambda x, axis: x.sum(axis, dtype=x.dtype))
    arange = staticmethod(lambda start, end, layout: value(torch.arange(start, end)))
    zeros = staticmethod(lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    load = staticmethod(lambda pointer, mask=None, other=0.0: pointer.load(mask, other))
    store = staticmethod(lambda pointer, x, mask=None: pointer.store(x, mask))
    minimum = staticmethod(lambda x, y: torch.minimum(value(x), value(y)))
    max = staticmethod(lambda x, axis: x.amax(axis))
    abs = staticmethod(torch.abs)
    maximum = staticmethod(lambda x, y: torch.maximum(value(x), value(y)))
    join = staticmethod(lambda x, y: torch.stack([x, y], -1))
    where = staticmethod(lambda condition, x, y: torch.where(value(condition), value(x), value(y)))

    def __init__(self) -> None:
        for name in DTYPES:
            setattr(self, name, getattr(torch, name))

    def program_id(self, axis: int) -> Value:
        return value(self.program)

    def num_programs(self, axis: int) -> int:
        return self.programs


LANGUAGE = Language()
STANDS_FOR = {
    **PTX, "gl": LANGUAGE, "mbarrier": FakeMBarrier, "tma": fake_tma, "warpgroup_mma": _mma, "mma_v2": _small_mma,
    "warpgroup_mma_wait": _mma_wait,
    **dict.fromkeys(("fence_async_shared", "gdc_launch_dependents", "gdc_wait"), lambda: None),
    # What a loop counts with is a tensor, too.
    "range": lambda *bounds: map(value, range(*map(int, bounds))),
}  # fmt: skip
_globals: dict[int, dict] = {}


def _python(function: JITFunction) -> types.FunctionType:
    """A kernel's function, and all that it calls, as Python."""
    original = function.fn.__globals__
    names = _globals.get(id(original))
    if names is None:
        names = _globals[id(original)] = {**original, **STANDS_FOR}
        for name, x in original.items():
            if isinstance(x, JITFunction) and name not in STANDS_FOR:
                names[name] = _python(x)
            elif isinstance(x, real_gl.constexpr):
                names[name] = x.value
    return types.FunctionType(function.fn.__code__, names, function.fn.__name__, function.fn.__defaults__)


def _argument(x):
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, Tensor):  # from its first element on
        size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return Pointer(torch.as_strided(x, (size,), (1,), x.storage_offset()))
    return x


class Interpreted:
    """In a kernel's place."""

    def __init__(self, kernel: JITFunction) -> None:
        self.run, self.signature = _python(kernel), inspect.signature(kernel.fn)
        self.started = 0

    def __getitem__(self, grid: tuple[int]):
        def start(*args, num_warps: int, maxnreg: int, launch_pdl: bool = False, **kwargs) -> None:
            bound = self.signature.bind(*args, **kwargs)
            arguments = {name: _argument(x) for name, x in bound.arguments.items()}
            self.started += 1
            LANGUAGE.programs = grid[0]
            for LANGUAGE.program in range(grid[0]):
                self.run(**arguments)

        return start


KERNELS = (
    (invert, "hopper_invert_kernel"),
    (scan, "hopper_scan_kernel"),
    (narrow_scan, "hopper_narrow_scan_kernel"),
    (maps, "hopper_map_kernel"),
    (both_ways, "hopper_both_ways_kernel"),
    (gradients, "hopper_gradient_kernel"),
)


@contextmanager
def interpreted(multiprocessors: int = 132) -> Iterator[dict[str, Interpreted]]:
    """Inside, ``chunk_forward`` and ``chunk_backward`` take tensors of the CPU as a Hopper GPU would; gives the kernels
    by name. ``multiprocessors``: of that GPU."""
    with ExitStack() as stack:
        stack.enter_context(as_if_on(CHIPS["sm_90"]._replace(multiprocessors=multiprocessors)))
        stack.enter_context(patch.object(hopper, "is_for", lambda x: True))
        kernels = {name: Interpreted(getattr(module, name)) for module, name in KERNELS}
        for module, name in KERNELS:
            stack.enter_context(patch.object(module, name, kernels[name]))
        yield kernels
