"""A model on disk: ``config.json`` and ``model.safetensors`` in one folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdn_ops.files import show, whole
from gdn_ops.models.config import HybridConfig
from gdn_ops.validation import FLOATS

if TYPE_CHECKING:
    from gdn_ops.models.hybrid import HybridLM

CONFIG_FILE, WEIGHTS_FILE, MODEL_TYPE = "config.json", "model.safetensors", "gdn_hybrid"


def save(model: HybridLM, folder: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """See :meth:`gdn_ops.models.HybridLM.save_pretrained`."""
    save_file, _, error_type = _safetensors()
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {folder}")
    weights = model.state_dict() if state_dict is None else state_dict
    for name, x in weights.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"state_dict: expected tensors, got {type(x).__name__} for {name}")
        if hasattr(x, "full_tensor"):  # a DTensor, whose type is not worth importing torch.distributed.tensor
            raise ValueError(
                f"state_dict: expected whole weights, got a part of {name} (gather them by "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
            )
    if state_dict is not None:
        _check_weights(model, weights, "state_dict")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    weights = _apart({name: x.detach().cpu().contiguous() for name, x in weights.items()})
    with whole(folder / CONFIG_FILE) as config_file, whole(folder / WEIGHTS_FILE) as weights_file:
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        try:
            save_file(weights, weights_file, metadata={"format": "pt"})
        except error_type as error:  # of a full disk, it is no OSError
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error
        show(weights_file)  # safetensors leaves 0600, which whoever serves the model could not read


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers may share weights, which the file's format has no way to say: each has its own there."""
    seen: set[int] = set()
    for name, x in weights.items():
        place = x.untyped_storage().data_ptr()
        weights[name] = x.clone() if place in seen else x
        seen.add(place)
    return weights


def load(
    cls: type[HybridLM],
    folder: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> HybridLM:
    """See :meth:`gdn_ops.models.HybridLM.from_pretrained`."""
    folder = Path(folder)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    config = read_config(folder)
    weights = _read_weights(folder, device)
    with torch.device("meta"):
        model = cls(config)
    _check_weights(model, weights, folder / WEIGHTS_FILE)
    if dtype is not None:
        weights = {name: x.to(dtype) for name, x in weights.items()}
    flags = {name: vars(p).get("_no_weight_decay", False) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    for name, p in model.named_parameters():
        if flags[name]:
            p._no_weight_decay = True
    return model


def read_config(folder: str | os.PathLike) -> HybridConfig:
    """The configuration saved in ``folder``."""
    path = Path(folder) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"folder: expected a saved model with {CONFIG_FILE}, got {folder}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    kind = fields.pop("model_type", None) if isinstance(fields, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(f"{path}: expected model_type {MODEL_TYPE!r}, got {kind!r}")
    try:
        return HybridConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(folder: Path, device) -> dict[str, torch.Tensor]:
    _, load_file, error_type = _safetensors()
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"folder: expected a saved model with {WEIGHTS_FILE}, got {folder}")
    device = torch.device(device or "cpu")
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected one of this machine's that holds numbers, got {device}")
    try:
        return load_file(path, device=str(device))
    except error_type as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _check_weights(model: HybridLM, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"{path}: expected the weight {name} {shape}, got none")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{path}: expected {name} of shape {shape}, got {tuple(weights[name].shape)}")
        if weights[name].dtype not in FLOATS:
            raise ValueError(
                f"{path}: expected {name} in a floating dtype of 16 bits or more, got {weights[name].dtype}"
            )
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{path}: expected only this model's weights, got {', '.join(unknown)}")


def _safetensors() -> tuple[Any, Any, type[Exception]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving and loading models needs safetensors: pip install 'gdn-ops[hf]'", name=error.name
        ) from error
    return save_file, load_file, SafetensorError
