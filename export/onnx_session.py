"""An ONNX file in ONNX Runtime on the CPU, tensors in and tensors out, and which of its nodes ran as kernels."""

from __future__ import annotations

import ctypes
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
# A profile has a line for every node that runs, those of loops each time: a whole proof's takes minutes to read.
PROFILED_RUNS = 4


class Session:
    """Runs a file with tensors in the order of its inputs; ``close`` gives the nodes that the first runs called.

    Raises ValueError with ONNX Runtime's message if it does not load the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._folder = tempfile.TemporaryDirectory()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        # Eager takes turns with it, on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Pays after more calls of a length than a proof makes.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "run")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes are not all exported
            self._folder.cleanup()
            raise ValueError(f"ONNX Runtime {onnxruntime.__version__} does not load the file: {error}") from error
        self._runs, self._profile = 0, None
        self.inputs = [x.name for x in self._session.get_inputs()]
        self.outputs = [x.name for x in self._session.get_outputs()]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        binding, kept = self._session.io_binding(), []
        for name, tensor in zip(self.inputs, tensors):
            kept.append(_value(tensor))
            binding.bind_ortvalue_input(name, kept[-1])
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        self._runs += 1
        if self._runs == PROFILED_RUNS:
            self._profile = self._session.end_profiling()
        return [_tensor(value) for value in binding.get_outputs()]

    def close(self) -> dict[str, set[str]]:
        """Names of the nodes that ran in the first PROFILED_RUNS calls, by operator; the session is spent."""
        profile = self._session.end_profiling() if self._profile is None else self._profile
        events = json.loads(Path(profile).read_text())
        self._folder.cleanup()
        nodes: dict[str, set[str]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                nodes.setdefault(event["args"]["op_name"], set()).add(event["name"].removesuffix("_kernel_time"))
        return nodes


def _value(tensor: Tensor) -> Any:
    from onnxruntime import OrtValue

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), _BFLOAT16)
    return OrtValue.ortvalue_from_numpy(tensor.numpy())


def _tensor(value: Any) -> Tensor:
    """The array holds on to the value, and with it to memory that the runtime would use again."""
    if value.data_type() != "tensor(bfloat16)":
        return torch.from_numpy(value.numpy())
    shape = value.shape()
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.bfloat16)
    raw = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(shape)
