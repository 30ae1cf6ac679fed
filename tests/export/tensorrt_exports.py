"""What the TensorRT tests build, each once a run of the tests: an engine takes ten seconds and more."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch
from filelock import FileLock  # torch depends on it

from tests.models.models import make

CAPABILITIES = ("sm_89", "sm_120")
MODELS, DTYPES = ("tiny", "h1"), (torch.float32, torch.float16)


class Engines:
    """``engines(name, dtype)`` gives the model, its export, and what the builder told of its progress.

    ``tiny`` is the preset, ``h1`` a layer of each kind, grouped value heads, a window that a chunk wraps. ``folder`` is
    shared by the processes of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.build = folder, functools.cache(self._build)

    def __call__(self, name: str, dtype: torch.dtype):
        return self.build(name, dtype)

    def _build(self, name: str, dtype: torch.dtype):
        from gdn_ops.export import TensorRTExport, build_tensorrt, read_manifest

        model = _model(name, dtype)
        out, progress = self.folder / f"{name}_{dtype}", self.folder / f"{name}_{dtype}.progress.json"
        with FileLock(f"{out}.lock"):
            if not progress.exists():
                told: list[tuple[str, int, int]] = []
                result = build_tensorrt(
                    model, out, runtime="tensorrt-rtx", compute_capabilities=CAPABILITIES,
                    progress=lambda *what: told.append(what),
                )  # fmt: skip
                progress.write_text(json.dumps(told))
                return model, result, told
        files = {path.name: path for path in sorted(out.iterdir())}
        report, layers = (json.loads(files[x].read_text()) for x in ("parity.json", "layers.json"))
        return model, TensorRTExport(out, files, read_manifest(out), report, layers), json.loads(progress.read_text())


def _model(name: str, dtype: torch.dtype):
    from gdn_ops.models import HybridConfig, HybridLM

    if name == "h1":
        return make("GS", dtype, num_v_heads=4, tie_word_embeddings=False)
    torch.manual_seed(0)
    return HybridLM(HybridConfig.preset("tiny")).to(dtype)


def shared_folder(tmp_path_factory) -> Path:
    """One for all processes of a run of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tensorrt_exports"
    folder.mkdir(exist_ok=True)
    return folder
