"""Who is timed on the CPU: gdn_ops, Hugging Face's torch functions, ONNX Runtime's kernels. All in fp32.

ONNX models of one node are built here. ``com.microsoft::LinearAttention`` is a fused kernel and takes grouped value
heads; ``ai.onnx::LinearAttention`` (opset 27) is a function that the runtime expands, and takes as many key heads as
value heads, so it gets q and k repeated beforehand, which is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

import gdn_ops
from perf.clocks import Call
from perf.providers import OURS, Provider, Unavailable, by_autograd, no_grad
from perf.shapes import Inputs


def _functions(chunk: Callable, recurrent: Callable, x: Inputs, direction: str) -> Call:
    """Calls of two functions with FLA's signatures; both leave ``scale`` at its default, which is ``x.scale``."""
    tensors = (x.q, x.k, x.v, x.g, x.beta)
    if direction == "forward":
        return no_grad(lambda: chunk(*tensors))
    if direction == "forward+backward":
        return by_autograd(lambda *leaves, scale: chunk(*leaves), x, direction)
    if direction == "decode":
        return no_grad(lambda: recurrent(*tensors, initial_state=x.state, output_final_state=True))
    raise Unavailable("these functions are timed forward, forward+backward and in decode")


def _gdn_ops(x: Inputs, direction: str) -> Call:
    return _functions(gdn_ops.chunk_gated_delta_rule, gdn_ops.recurrent_gated_delta_rule, x, direction)


def _gdn_ops_chunk(x: Inputs, direction: str) -> Call:
    """The chunk function at one token, for models that call nothing else."""
    if direction != "decode":
        raise Unavailable("the same as gdn_ops but for decode")
    return _functions(gdn_ops.chunk_gated_delta_rule, gdn_ops.chunk_gated_delta_rule, x, direction)


def _transformers(x: Inputs, direction: str) -> Call:
    importlib.import_module("transformers").logging.set_verbosity_error()
    model = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    return _functions(model.torch_chunk_gated_delta_rule, model.torch_recurrent_gated_delta_rule, x, direction)


def one_node_model(x: Inputs, domain: str) -> bytes:
    """``LinearAttention`` of ``domain`` (``"com.microsoft"`` or ``""``, opset 27) at exactly the shapes of ``x``."""
    from onnx import TensorProto, helper

    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    inputs = {
        "query": [B, T, H * K], "key": [B, T, H * K], "value": [B, T, HV * V], "past_state": [B, HV, K, V],
        "decay": [B, T, HV], "beta": [B, T, HV],
    }  # fmt: skip
    outputs = {"output": [B, T, HV * V], "present_state": [B, HV, K, V]}
    node = helper.make_node(
        "LinearAttention", list(inputs), list(outputs), domain=domain,
        q_num_heads=H, kv_num_heads=HV, update_rule="gated_delta", scale=x.scale,
    )  # fmt: skip

    def described(values: dict[str, list[int]]) -> list:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]

    graph = helper.make_graph([node], "linear_attention", described(inputs), described(outputs))
    opsets = [helper.make_opsetid("", 20 if domain else 27)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _onnxruntime(x: Inputs, direction: str, domain: str) -> Call:
    if direction == "forward+backward":
        raise Unavailable("onnxruntime: inference only")
    runtime = importlib.import_module("onnxruntime")
    if not domain:
        group = x.v.shape[2] // x.q.shape[2]
        x = x._replace(q=x.q.repeat_interleave(group, 2), k=x.k.repeat_interleave(group, 2))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would spin on the cores through the turns of the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(one_node_model(x, domain), options, providers=["CPUExecutionProvider"])
    o, state = torch.empty_like(x.v), torch.empty_like(x.state)
    feeds = {"query": x.q, "key": x.k, "value": x.v, "past_state": x.state, "decay": x.g, "beta": x.beta}
    binding = session.io_binding()
    for name, tensor in feeds.items():
        value = tensor.flatten(2) if name in ("query", "key", "value") else tensor
        binding.bind_input(name, "cpu", 0, "float32", list(value.shape), value.data_ptr())
    binding.bind_output("output", "cpu", 0, "float32", list(o.flatten(2).shape), o.data_ptr())
    binding.bind_output("present_state", "cpu", 0, "float32", list(state.shape), state.data_ptr())

    def call():
        session.run_with_iobinding(binding)
        return o, state, feeds  # feeds: the runtime holds bare pointers into them

    return call


CPU_PROVIDERS = {
    p.name: p
    for p in (
        Provider(OURS, _gdn_ops),
        Provider("gdn_ops chunk", _gdn_ops_chunk),
        Provider("transformers", _transformers, ("transformers.models.qwen3_next", "transformers")),
        Provider("ORT com.microsoft", lambda x, d: _onnxruntime(x, d, "com.microsoft"), ("onnxruntime", "onnxruntime")),
        Provider("ORT ai.onnx", lambda x, d: _onnxruntime(x, d, ""), ("onnxruntime", "onnxruntime")),
    )
}
