"""A model as ``torch.export`` programs with every state explicit.

A :class:`gdn_ops.models.HybridLM` becomes two programs, ``prefill`` and ``step``, both
``(input_ids, state) -> (logits, state)``, where ``state`` is a flat dict of tensors by dotted name
(``layers.0.recurrent``, ``layers.0.conv``, ``position``, ...). Any other module becomes one program, ``forward``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.utils import _pytree as pytree

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 70


class Plan(NamedTuple):
    """One program to be: the module whose ``forward`` it is, inputs to trace with, and what to call things."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    inputs: list[str]
    states: list[str]


def flatten_state(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors to one dict by dotted name, in the order met.

    Example::

        >>> list(flatten_state({"layers": {"0": {"conv": torch.zeros(1)}}, "position": torch.zeros(1)}))
        ['layers.0.conv', 'position']
    """
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        flat.update({prefix + key: value} if isinstance(value, Tensor) else flatten_state(value, f"{prefix}{key}."))
    return flat


def nest_state(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of :func:`flatten_state`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


class Prefill(nn.Module):
    """``HybridLM.prefill`` with a flat state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, new_state = self.model.prefill(input_ids, nest_state(state))
        return logits, _in_order(new_state, state)


class Step(nn.Module):
    """``HybridLM.step`` with a flat state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, new_state = self.model.step(input_ids, nest_state(state))
        return logits, _in_order(new_state, state)


def _in_order(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = flatten_state(state)
    return {name: flat[name] for name in like}


def is_language_model(model: nn.Module) -> bool:
    """Whether ``model`` becomes ``prefill`` and ``step``."""
    from gdn_ops.models import HybridLM

    return isinstance(model, HybridLM)


def device_of(model: nn.Module, inputs: Any = ()) -> torch.device:
    """The one device of the parameters, buffers and example inputs; ValueError for several."""
    tensors = [*model.parameters(), *model.buffers(), *(x for x in pytree.tree_leaves(inputs) if torch.is_tensor(x))]
    devices = {x.device for x in tensors} or {torch.device("cpu")}
    if len(devices) > 1:
        raise ValueError(f"model: expected parameters and inputs on one device, got {sorted(map(str, devices))}")
    return devices.pop()


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; every submodule's mode is restored, and what its buffers hold."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, x, x.detach().clone())
        for module in modes
        for name, x in module._buffers.items()
        if x is not None
    ]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, name, x, before in buffers:
            module._buffers[name] = x
            if x.device.type != "meta" and not torch.equal(x, before):
                with torch.no_grad():
                    x.copy_(before)


def plan(model: nn.Module, example_inputs: Any = None, dynamic_shapes: Any = None) -> dict[str, Plan]:
    """What to export of ``model``, by program name. Raises as :func:`export_program`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if is_language_model(model):
        if example_inputs is not None or dynamic_shapes is not None:
            raise ValueError(
                "example_inputs, dynamic_shapes: expected None for a HybridLM (its programs are fixed), got values; "
                "wrap the model in a module of your own to choose them"
            )
        return _language_model_plans(model)
    if example_inputs is None:
        raise ValueError(
            f"example_inputs: expected a tuple (or a dict of keyword arguments) for {type(model).__name__}, got None; "
            "only a HybridLM has known inputs"
        )
    if isinstance(example_inputs, dict):
        args, kwargs = (), _arguments(model, (), example_inputs)  # in the order of the program's inputs
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    else:
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs: expected a tuple or a dict, got {kind} (write (x,) for one input)")
    device_of(model, (args, kwargs))
    # Inductor compiles for the strides of the example, and a package's inputs are contiguous (see the manifest).
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
    return {"forward": Plan(model, args, kwargs, dynamic_shapes, _input_names(model, args, kwargs), [])}


def _language_model_plans(model: nn.Module) -> dict[str, Plan]:
    device = device_of(model)
    with torch.no_grad():
        state = flatten_state(model.init_state(EXAMPLE_BATCH))
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.long, device=device)
    batch, length = Dim("batch", min=1), Dim("T", min=1)
    states, state_dims = list(state), {name: {0: batch} for name in state}
    inputs = ["input_ids", *states]
    return {
        "prefill": Plan(Prefill(model), (ids, state), {}, ({0: batch, 1: length}, state_dims), inputs, states),
        "step": Plan(Step(model), (ids[:, 0].contiguous(), state), {}, ({0: batch}, state_dims), inputs, states),
    }


def path_name(path: tuple) -> str:
    """A pytree path as a dotted name."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _arguments(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``forward`` is called with, by its parameters' names and in their order."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"example_inputs: do not fit {type(model).__name__}.forward: {error}") from error
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return dict(bound)


def arguments(item: Plan) -> dict[str, Any]:
    """The example of a plan by the names of ``forward``'s parameters."""
    return _arguments(item.module, item.args, item.kwargs)


def by_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf by its dotted name."""
    return {path_name(path): leaf for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]}


def _input_names(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    return [name for name, x in by_name(_arguments(model, args, kwargs)).items() if torch.is_tensor(x)]


def export_plan(item: Plan) -> ExportedProgram:
    """Traces one plan.

    The tracer asks of a size whether it is 1, and then refuses a program whose packed sequences (one less than their
    bounds) may be one. Where that is why it refuses, it is made to leave the question open; not always, because that
    costs it what it knows of other sizes.
    """
    with inference(item.module):
        try:
            return _trace(item)
        except UserError as error:
            if error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
                raise
            try:
                with symbolic_shapes_config.patch(backed_size_oblivious=True):
                    return _trace(item)
            except Exception:
                raise error from None


def _trace(item: Plan) -> ExportedProgram:
    return torch.export.export(item.module, item.args, item.kwargs, dynamic_shapes=item.dynamic_shapes, strict=False)


def export_program(
    model: nn.Module, example_inputs: Any = None, dynamic_shapes: Any = None
) -> dict[str, ExportedProgram]:
    """Exports ``model`` as named programs in which each operator of this package is one node.

    A :class:`gdn_ops.models.HybridLM` gives ``prefill`` (``input_ids [batch, T]``, both dynamic from 1) and ``step``
    (``input_ids [batch]``); both take and return all states as a flat dict by dotted name, and give
    ``(logits, state)``. Any other module gives ``forward``, traced with ``example_inputs`` (a tuple, or a dict of
    keyword arguments); ``dynamic_shapes`` is passed on to :func:`torch.export.export`. The model is traced in
    evaluation mode without gradients and left as it was.

    Programs are saved and loaded by ``torch.export.save`` and ``torch.export.load``; loading one needs
    ``import gdn_ops``, which registers the operators.

    Raises:
        ValueError: ``example_inputs`` missing, not fitting ``forward``, or on several devices.
        TypeError: ``model`` or ``example_inputs`` of a wrong type.

    Example::

        >>> class Rule(torch.nn.Module):
        ...     def forward(self, q, k, v, g, beta):
        ...         return gdn_ops.chunk_gated_delta_rule(q, k, v, g, beta)[0]
        >>> inputs = (*torch.randn(3, 2, 70, 2, 16), -torch.rand(2, 70, 2), torch.rand(2, 70, 2))
        >>> dims = tuple({0: Dim("batch", min=1), 1: Dim("T", min=1)} for _ in inputs)
        >>> export_program(Rule(), inputs, dims)["forward"].module()(*inputs).shape
        torch.Size([2, 70, 2, 16])
    """
    return {name: export_plan(item) for name, item in plan(model, example_inputs, dynamic_shapes).items()}
