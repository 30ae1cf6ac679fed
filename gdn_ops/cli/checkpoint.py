"""Checkpoints of a run: ``checkpoints/step-00000250/`` under the run's folder.

Each is a model folder of its own (``config.json``, ``model.safetensors``, ``text.json``) with ``training.pt`` beside:
the optimizer's state, the random states and the step. It is written under a temporary name, forced to the disk and then
renamed, and only then is the one before it removed; so at every moment the newest one there is whole.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gdn_ops.cli.errors import UserError, at_the_door
from gdn_ops.files import Archive, beside, sync

if TYPE_CHECKING:
    import torch

    from gdn_ops.cli.text import Text

FOLDER, STATE = "checkpoints", "training.pt"
_NAME = re.compile(r"step-(\d{8,})")


def newest(run: Path) -> Path | None:
    """The folder of the last checkpoint of a run, if it has one."""
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, key=_step, default=None)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def save(run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, text: Text) -> None:
    """Writes the checkpoint of ``step`` and removes older ones, and what a killed process left of others."""
    import torch

    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    target = folder / f"step-{step:08d}"
    work = beside(target)
    try:
        work.mkdir()
        model.save_pretrained(work)
        text.save(work)
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state_all()
        with Archive(work / STATE, "w") as file:
            torch.save({"step": step, "optimizer": optimizer.state_dict(), "random": random}, file)
        sync(work)
        if target.exists():  # only a checkpoint that could not be read is ever written again
            shutil.rmtree(target)
        work.rename(target)
        sync(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and _step(path) < step:
            shutil.rmtree(path, ignore_errors=True)


def load(path: Path, device: torch.device) -> torch.nn.Module:
    """The model of one checkpoint."""
    from gdn_ops.models import HybridLM

    with at_the_door("--out"):
        return HybridLM.from_pretrained(path, device=device)


def restore(path: Path, optimizer: torch.optim.Optimizer) -> int:
    """Puts the optimizer and the random states where they were; returns the step."""
    import torch

    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        cuda = state["random"].get("cuda", [])
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        if state["step"] != _step(path):
            raise ValueError(f"step {state['step']}")
    except torch.OutOfMemoryError:  # no fault of the checkpoint
        raise
    except Exception as error:  # truncated archives, missing files and foreign pickles raise many kinds
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        whole = f"--out: expected a whole checkpoint in {path}"
        raise UserError(f"{whole}, got {STATE} with {line} (remove that folder to go without)") from error
    return state["step"]
