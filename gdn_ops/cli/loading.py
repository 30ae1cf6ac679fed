"""A folder as something that runs: a trained model (eager), or an export of one. Both answer the same three calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gdn_ops.cli.errors import UserError, at_the_door, need
from gdn_ops.cli.generate_onnx import MODEL

if TYPE_CHECKING:
    import torch


class Runner(Protocol):
    """What generates: ``input_ids [B, T]``, then ``[B]`` a step; states are whatever the calls before returned."""

    def init_state(self, batch: int) -> Any: ...

    def prefill(self, input_ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]: ...

    def step(self, input_ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]: ...


class Loaded(NamedTuple):
    """``target`` is ``eager`` or the export's."""

    runner: Runner
    target: str
    device: torch.device
    vocab_size: int


def is_export(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def load(folder: Path, device: str) -> Loaded:
    """The model or the export in ``folder``."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"DIR: expected a folder with a model or an export, got {folder}, which {kind}")
    return _export(folder, device) if is_export(folder) else _model(folder, device)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A trained model, in evaluation mode."""
    from gdn_ops.cli import checkpoint
    from gdn_ops.models import HybridLM

    if not (folder / "config.json").is_file():
        newest = checkpoint.newest(folder)
        hint = "" if newest is None else f" (its training has not ended; the last checkpoint is {newest})"
        raise UserError(f"DIR: expected config.json and model.safetensors in it, got {folder} without them{hint}")
    need("safetensors", "a model's folder", "hf")
    with at_the_door("DIR"):
        return HybridLM.from_pretrained(folder, device=device, dtype=dtype).eval()


def _model(folder: Path, device: str) -> Loaded:
    from gdn_ops.cli.device import pick

    chosen = pick(device)
    model = load_model(folder, chosen)
    return Loaded(model, "eager", chosen, model.config.vocab_size)


def _export(folder: Path, device: str) -> Loaded:
    from gdn_ops.cli.device import pick
    from gdn_ops.export import load_package, read_manifest
    from gdn_ops.export.manifest import FORMAT

    with at_the_door("DIR"):
        manifest = read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise UserError(f"DIR: expected {MODEL} in it, as in an export for {manifest['target']}, got {folder} without")
    if not {"prefill", "step"} <= manifest["programs"].keys():
        raise UserError(f"DIR: expected an export of a language model, got one of {manifest['model']}")
    wanted = pick(manifest["device"] if device == "auto" else device)
    if wanted.type != manifest["device"]:
        raise UserError(f"--device: expected {manifest['device']}, which {folder} was exported for, got {device}")
    with at_the_door("DIR"):
        package = load_package(folder, wanted)
    return Loaded(package, manifest["target"], package.device, manifest["config"]["vocab_size"])
