"""What the ONNX tests export, each once a process: it takes some seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from tests.export import modules
from tests.models.models import make

try:
    from onnxruntime import __version__ as RUNTIME
except ImportError:
    RUNTIME = "0.0"
# ONNX Runtime 1.32 was the first here with these operators, and has no build for Python 3.10.
needs_the_operators = pytest.mark.skipif(
    tuple(int(part) for part in RUNTIME.split(".")[:2]) < (1, 32),
    reason=f"ONNX Runtime {RUNTIME} has neither opset 27 nor the fused kernels",
)
TARGETS = ("portable", *(pytest.param(target, marks=needs_the_operators) for target in ("ort", "onnx27")))
_FOLDER = tempfile.TemporaryDirectory(prefix="onnx_exports.")


@functools.cache
def mixer(target: str, dtype: torch.dtype = torch.float32):
    from gdn_ops.export import export_onnx

    model = modules.Mixer(dtype)
    inputs, name = modules.mixer_inputs(3, 70, dtype), f"mixer_{target}_{dtype}"
    return model, export_onnx(model, Path(_FOLDER.name) / name, target, inputs, modules.mixer_shapes())


@functools.cache
def language_model(target: str, dtype: torch.dtype = torch.float32):
    """Two layers of each kind, grouped value heads; a window that a chunk wraps."""
    from gdn_ops.export import export_onnx

    model = make("GS", dtype, num_v_heads=4, tie_word_embeddings=False)
    return model, export_onnx(model, Path(_FOLDER.name) / f"hybrid_{target}_{dtype}", target)
