"""Plugins that TensorRT's ONNX parser asks for by name: ``LinearAttention`` and ``CausalConvWithState`` of opset 27.

The parser knows both operators, and that each needs a plugin of that name, in no namespace; TensorRT ships none. Quick
plugins must have a namespace, so these are of the older kind, and Python runs them (just in time): the same kernels,
launched from torch. What they compute is what this package's ``onnx27`` files ask for: ``update_rule`` gated_delta,
every input there, fp32 states.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from gdn_ops.lowering.tensorrt import plugins
from torch import Tensor

# Positions of the tensors in a node's inputs and outputs, one after another.
RULE_DTYPES, CONV_DTYPES = "qqqsgbqs", "xxxxxx"


def linear_attention(inputs: list[Tensor], outputs: list[Tensor], fields: dict[str, Any]) -> None:
    """``query, key [B, T, H K]``, ``value [B, T, HV V]``, state, decay, beta to ``output [B, T, HV V]`` and state."""
    from gdn_ops.lowering.tensorrt.kernels import launch

    rule = fields.get("update_rule", "gated_delta")
    if rule != "gated_delta":
        raise ValueError(f"update_rule: expected 'gated_delta', got {rule!r}")
    query, key, value, state, decay, beta = inputs
    H, HV = int(fields["q_num_heads"]), int(fields["kv_num_heads"])
    q, k, v, o = (x.unflatten(-1, (n, -1)) for x, n in ((query, H), (key, H), (value, HV), (outputs[0], HV)))
    scale = float(fields.get("scale", 0.0)) or q.shape[-1] ** -0.5  # the standard's 0 stands for this
    name = "recurrent_gated_delta_rule" if q.shape[1] == 1 else "chunk_gated_delta_rule"
    launch(name, {"scale": scale}, q, k, v, decay, beta, state, outputs=[o, outputs[1]])


def causal_conv_with_state(inputs: list[Tensor], outputs: list[Tensor], fields: dict[str, Any]) -> None:
    """``input [B, D, T]``, ``weight [D, 1, W]``, bias, state to ``output [B, D, T]`` and state; channels first."""
    from gdn_ops.lowering.tensorrt.kernels import launch

    activation = fields.get("activation", "none")
    if activation not in ("none", "", "silu", "swish"):
        raise ValueError(f"activation: expected 'none' or 'silu', got {activation!r}")
    x, weight, bias, state = inputs
    silu = int(activation in ("silu", "swish"))
    y, _ = launch(
        "causal_conv1d", {"silu": silu}, x.transpose(1, 2).contiguous(), weight.squeeze(1), bias, state,
        outputs=[torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format), outputs[1]],
    )  # fmt: skip
    outputs[0].copy_(y.transpose(1, 2))


# By name: what computes it, its inputs, and for each output the input that it is like; a letter a dtype.
NODES = {
    "LinearAttention": (linear_attention, 6, (2, 3), RULE_DTYPES),
    "CausalConvWithState": (causal_conv_with_state, 4, (0, 3), CONV_DTYPES),
}
FIELDS = ("q_num_heads", "kv_num_heads", "scale", "update_rule", "activation")


def read_fields(collection: Any) -> dict[str, Any]:
    """A plugin's fields as Python values: one number or a text; those that the plugins do not know are left out."""
    found: dict[str, Any] = {}
    for item in collection:
        if item.name in FIELDS:
            text = item.data.tobytes() if item.data.dtype.itemsize == 1 else None
            found[item.name] = item.data.reshape(-1)[0].item() if text is None else text.rstrip(b"\0").decode()
    return found


def supports(dtypes: str, types: list[Any], names: dict[Any, str]) -> bool:
    """Whether the last of ``types`` fits those before it: activations and gates of one dtype a letter, states fp32."""
    position = len(types) - 1
    letter, dtype = dtypes[position], types[position]
    if dtype not in names:
        return False
    if letter == "s":
        return names[dtype] == "float32"
    before = [x for x, other in zip(types[:position], dtypes) if other == letter]
    return all(x == dtype for x in before)


@functools.cache
def register() -> None:
    """Registers both plugins once a process."""
    import tensorrt as trt

    registry = trt.get_plugin_registry()
    for name in NODES:
        registry.register_creator(creator(trt, name), "")


def creator(trt: ModuleType, name: str) -> Any:
    """The creator of plugin ``name``, version 1, in no namespace."""
    compute, count, like, dtypes = NODES[name]
    names = plugins.dtype_names(trt)
    kinds = {"update_rule": "CHAR", "activation": "CHAR", "scale": "FLOAT32"}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, fields: dict[str, Any]) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, "", "1"
            self.num_outputs, self.fields = len(like), fields

        def get_capability_interface(self, type):
            return self

        def get_output_data_types(self, input_types):
            return [input_types[i] for i in like]

        def get_output_shapes(self, inputs, shape_inputs, exprBuilder):
            return [trt.DimsExprs(inputs[i]) for i in like]

        def supports_format_combination(self, pos, in_out, num_inputs):
            linear = in_out[pos].desc.format == trt.TensorFormat.LINEAR
            return linear and supports(dtypes, [x.desc.type for x in in_out[: pos + 1]], names)

        def configure_plugin(self, in_, out):
            if len(in_) != count:
                raise ValueError(f"{name}: expected {count} inputs, got {len(in_)}: leave none out")

        def on_shape_change(self, in_, out):
            pass

        def attach_to_context(self, context):
            return self.clone()

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection([_field(trt, key, value, kinds) for key, value in self.fields.items()])

        def enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream):
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                given, made = (
                    [plugins.view(address, tuple(x.dims), names[x.type]) for address, x in zip(addresses, descs)]
                    for addresses, descs in ((inputs, input_desc), (outputs, output_desc))
                )
                compute(given, made, self.fields)

        def clone(self):
            return Plugin(dict(self.fields))

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, "", "1"
            fields = [_field(trt, key, "" if key in kinds and key != "scale" else 0, kinds) for key in FIELDS]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name, fc, phase):
            return Plugin(read_fields(fc))

    return Creator()


def _field(trt: ModuleType, key: str, value: Any, kinds: dict[str, str]) -> Any:
    import numpy

    kind = kinds.get(key, "INT64")
    data = {"CHAR": lambda: str(value).encode(), "FLOAT32": lambda: numpy.array([value], numpy.float32)}
    return trt.PluginField(
        key, data.get(kind, lambda: numpy.array([value], numpy.int64))(), getattr(trt.PluginFieldType, kind)
    )
