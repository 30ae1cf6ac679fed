"""Who is timed on the CPU: gdn_ops, Hugging Face's torch functions, ONNX Runtime's kernels. All in fp32.

ONNX models of one node are built here. ``com.microsoft::LinearAttention`` is a fused kernel and takes grouped value
heads; ``ai.onnx::LinearAttention`` (opset 27) is a function that the runtime expands, and takes as many key heads as
value heads, so it gets q and k repeated beforehand, which is not timed. ``gdn_ops portable ONNX`` is the local function
that ``gdn export --target portable`` writes, run by the same runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import gdn_ops
from perf.clocks import Call
from perf.providers import OURS, Provider, Unavailable, by_autograd, no_grad
from perf.shapes import Inputs

PORTABLE = "gdn_ops portable ONNX"


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
    from onnx import helper

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
    return model(node, inputs, outputs, {"": 20, domain: 1} if domain else {"": 27})


def portable_model(x: Inputs) -> bytes:
    """``gdn_ops::GatedDeltaRule`` as a local function, for any batch and length, as an exported model has it."""
    from gdn_ops.lowering.onnx.function import DOMAIN, OPSET
    from gdn_ops.lowering.onnx.rule import rule
    from onnx import helper

    (H, K), (HV, V) = x.q.shape[2:], x.v.shape[2:]
    rows, state = ["B", "T"], ["B", HV, K, V]
    inputs = {"q": [*rows, H, K], "k": [*rows, H, K], "v": [*rows, HV, V], "g": [*rows, HV], "beta": [*rows, HV]}
    inputs |= {"initial_state": state}
    outputs = {"o": [*rows, HV, V], "final_state": state}
    node = helper.make_node("GatedDeltaRule", list(inputs), list(outputs), domain=DOMAIN, scale=x.scale)
    return model(node, inputs, outputs, {"": OPSET, DOMAIN: 1}, [rule()])


def model(node, inputs: dict, outputs: dict, opsets: dict[str, int], functions: Sequence = ()) -> bytes:
    from onnx import TensorProto, helper

    def described(values: dict[str, list]) -> list:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]

    graph = helper.make_graph([node], node.op_type, described(inputs), described(outputs))
    imports = [helper.make_opsetid(*item) for item in opsets.items()]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    return model.SerializeToString()


def session(model: bytes, profile: Path | None = None):
    """An ONNX Runtime session on as many threads as torch has; with ``profile``, one that writes a profile there."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would spin on the cores through the turns of the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bound(session, feeds: dict[str, torch.Tensor], results: Sequence[torch.Tensor]) -> Call:
    """A call of the session, which writes into ``results`` and returns them."""
    feeds = {name: tensor.contiguous() for name, tensor in feeds.items()}
    binding = session.io_binding()
    for name, tensor in feeds.items():
        binding.bind_input(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())
    for described, tensor in zip(session.get_outputs(), results):
        shape = list(tensor.shape if len(described.shape) == tensor.dim() else tensor.flatten(2).shape)
        binding.bind_output(described.name, "cpu", 0, "float32", shape, tensor.data_ptr())

    def call():
        session.run_with_iobinding(binding)
        return *results, feeds  # feeds: the runtime holds bare pointers into them

    return call


def portable_call(session, x: Inputs) -> Call:
    feeds = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta, "initial_state": x.state}
    return bound(session, feeds, (torch.empty_like(x.v), torch.empty_like(x.state)))


def _by_node(x: Inputs, direction: str, domain: str) -> Call:
    _need_inference(direction)
    if not domain:
        group = x.v.shape[2] // x.q.shape[2]
        x = x._replace(q=x.q.repeat_interleave(group, 2), k=x.k.repeat_interleave(group, 2))
    feeds = {"query": x.q.flatten(2), "key": x.k.flatten(2), "value": x.v.flatten(2), "past_state": x.state}
    results = torch.empty_like(x.v), torch.empty_like(x.state)
    return bound(session(one_node_model(x, domain)), {**feeds, "decay": x.g, "beta": x.beta}, results)


def _portable(x: Inputs, direction: str) -> Call:
    _need_inference(direction)
    return portable_call(session(portable_model(x)), x)


def _need_inference(direction: str) -> None:
    if direction == "forward+backward":
        raise Unavailable("onnxruntime: inference only")


CPU_PROVIDERS = {
    p.name: p
    for p in (
        Provider(OURS, _gdn_ops),
        Provider("gdn_ops chunk", _gdn_ops_chunk),
        Provider("transformers", _transformers, ("transformers.models.qwen3_next", "transformers")),
        Provider("ORT com.microsoft", lambda x, d: _by_node(x, d, "com.microsoft"), ("onnxruntime", "onnxruntime")),
        Provider("ORT ai.onnx", lambda x, d: _by_node(x, d, ""), ("onnxruntime", "onnxruntime")),
        Provider(PORTABLE, _portable, ("onnxruntime", "onnxruntime")),
    )
}
