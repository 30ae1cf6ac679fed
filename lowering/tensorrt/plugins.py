"""Registers the declared kernels as quick-deployable plugins of full TensorRT (10.9 and later, not 10.14).

Each has a descriptor (shapes and dtypes of the outputs: an fp32 state beside 16-bit activations), an implementation
ahead of time (PTX with a symbolic grid; the engine needs no Python) and one just in time (the same kernel, launched
from torch). A network made with ``PREFER_AOT_PYTHON_PLUGINS`` takes the first. The plugin with an aliased state wants
``PreviewFeature.ALIASED_PLUGIN_IO_10_03``.

TensorRT reads names, order and types from a function's signature, so the functions get theirs from the declaration.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch
from gdn_ops.lowering.tensorrt.compile import compile_kernel
from gdn_ops.lowering.tensorrt.declaration import NAMESPACE, PLUGINS, PluginKernel

_TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}


@functools.cache
def register() -> ModuleType:
    """Registers every plugin once a process; returns ``tensorrt.plugin``.

    Example::

        >>> trtp = register()  # doctest: +SKIP
        >>> plugin = trtp.op.gdn.recurrent_gated_delta_rule(q, k, v, g, beta, state, scale=0.1)  # doctest: +SKIP
        >>> layer = network.add_plugin(plugin, aot=True)  # doctest: +SKIP
    """
    import tensorrt
    import tensorrt.plugin

    for kernel in PLUGINS.values():
        _register(kernel, tensorrt, tensorrt.plugin)
    return tensorrt.plugin


def add_plugin(network: Any, name: str, inputs: list[Any], attributes: dict[str, Any], aot: bool = True) -> list[Any]:
    """Puts plugin ``name`` into a TensorRT network; returns its output tensors."""
    kernel, namespace = PLUGINS[name], getattr(register().op, NAMESPACE)
    given = {key: kind(attributes[key]) for key, kind in kernel.attributes.items()}
    layer = network.add_plugin(getattr(namespace, name)(*inputs, **given), aot=aot)
    if layer is None:
        raise RuntimeError(f"{kernel.id}: TensorRT made no plugin layer")
    return [layer.get_output(i) for i in range(len(kernel.outputs))]


def dtype_names(trt: ModuleType) -> dict[Any, str]:
    """Names of the dtypes that plugins take, by TensorRT's."""
    return {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}


def _dtypes(kernel: PluginKernel, trt: ModuleType, tensors: Any) -> dict[str, str]:
    names = dtype_names(trt)
    return kernel.bind_dtypes([names.get(x.dtype, str(x.dtype)) for x in tensors])


def _register(kernel: PluginKernel, trt: ModuleType, trtp: ModuleType) -> None:
    count, attributes = len(kernel.inputs), tuple(kernel.attributes)

    def describe(*tensors: Any, **values: Any) -> tuple:
        sizes = kernel.bind_sizes([x.shape_expr for x in tensors])
        dtypes, codes = _dtypes(kernel, trt, tensors), {name: code for code, name in dtype_names(trt).items()}
        by_name = {x.name: tensor for x, tensor in zip(kernel.inputs, tensors)}
        return tuple(
            by_name[kernel.aliases[x.name]].aliased()
            if x.name in kernel.aliases
            else trtp.from_shape_expr(tuple(sizes[name] for name in x.shape), codes[kernel.dtype_of(x, dtypes)])
            for x in kernel.outputs
        )

    def ahead_of_time(*given: Any) -> tuple:
        tensors, values = given[:count], dict(zip(attributes, given[count : count + len(attributes)]))
        sizes = kernel.bind_sizes([x.shape_expr for x in tensors])
        static = {name: _constant(kernel, name, x) for name, x in sizes.items() if name not in kernel.extras}
        major, minor = torch.cuda.get_device_capability()
        built = compile_kernel(kernel, static, _dtypes(kernel, trt, tensors), values, 10 * major + minor)
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x = kernel.grid(sizes, built.constants, trtp.cdiv)
        parameters.block_x = built.threads
        parameters.shared_mem = built.shared_memory
        extras = trtp.SymIntExprs(len(kernel.extras))
        for index, name in enumerate(kernel.extras):
            extras[index] = trtp.SymInt32(sizes[name])
        return built.name, built.ptx, parameters, extras

    def just_in_time(*given: Any, stream: int) -> None:
        from gdn_ops.lowering.tensorrt.kernels import launch

        *first, outputs = given
        values = dict(zip(attributes, first[count:]))
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            views = [as_torch(x, trt) for x in (*first[:count], *outputs)]
            launch(kernel.name, values, *views[:count], outputs=views[count:])

    kinds = [(x, kernel.attributes[x]) for x in attributes]
    tensors = [x.name for x in kernel.inputs]
    made = tuple[(trtp.TensorDesc,) * len(kernel.outputs)]
    given = tuple[(trtp.Tensor,) * len(kernel.outputs)]
    launched = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    descs, views = ([(x, kind) for x in tensors] for kind in (trtp.TensorDesc, trtp.Tensor))
    _sign(describe, kernel, [*descs, *kinds], made)
    _sign(ahead_of_time, kernel, [*descs, *kinds, ("outputs", made), ("tactic", int)], launched)
    _sign(just_in_time, kernel, [*views, *kinds, ("outputs", given), ("stream", int)], None)
    trtp.register(kernel.id)(describe)
    trtp.aot_impl(kernel.id)(ahead_of_time)
    trtp.impl(kernel.id)(just_in_time)


def _sign(function: Any, kernel: PluginKernel, parameters: list[tuple[str, Any]], returns: Any) -> None:
    named = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in parameters
    ]
    function.__signature__ = inspect.Signature(named, return_annotation=returns)
    function.__name__ = f"{kernel.name}_{function.__name__}"


def _constant(kernel: PluginKernel, name: str, size: Any) -> int:
    if not size.is_constant:
        raise ValueError(f"{kernel.id}: expected a fixed size {name}, got a dynamic one: only B and T may vary")
    return size.constant_value()


class _Memory:
    """What torch needs to look at memory that is not its own."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def view(address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Contiguous device memory as a torch tensor, without a copy. The interface has no bfloat16, so that travels as
    16-bit integers."""
    tensor = torch.as_tensor(_Memory(address, shape, _TYPESTR[dtype]), device="cuda")
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def as_torch(tensor: Any, trt: ModuleType) -> torch.Tensor:
    """A ``tensorrt.plugin.Tensor``, which is linear, as torch sees it."""
    return view(tensor.data_ptr, tuple(tensor.shape), dtype_names(trt)[tensor.dtype])
