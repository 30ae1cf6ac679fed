"""Loads an export and runs it, with checks: files against their digests, inputs against the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gdn_ops.export.manifest import FORMAT, FORMAT_VERSION, FORMATS, sha256
from torch import Tensor
from torch.utils import _pytree as pytree


def read_manifest(out_dir: str | Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError if ``out_dir`` is none, or one of a newer format."""
    path = Path(out_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"out_dir: expected an export with a manifest.json, got {Path(out_dir)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"out_dir: expected JSON in {path}, got {error}") from error
    version = manifest.get("format_version")
    if manifest.get("format") not in FORMATS or version != FORMAT_VERSION:
        got, expected = f"{manifest.get('format')} {version}", f"{' or '.join(FORMATS)} {FORMAT_VERSION}"
        raise ValueError(f"out_dir: expected format {expected} in {path}, got {got}")
    return manifest


def verify(out_dir: str | Path) -> dict[str, Any]:
    """Checks size and SHA-256 of every file of an export and that its parity report passed; returns the manifest.

    Raises ValueError naming the file that is missing or differs.
    """
    manifest = read_manifest(out_dir)
    for entry in (x for program in manifest["programs"].values() for x in (program, *program.get("data", ()))):
        path = Path(out_dir) / entry["file"]
        if not path.is_file():
            raise ValueError(f"out_dir: expected the file {entry['file']}, got none in {out_dir}")
        if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
            raise ValueError(f"{entry['file']}: expected sha256 {entry['sha256']}, got another file")
    report = json.loads((Path(out_dir) / "parity.json").read_text())
    if not report["passed"]:
        raise ValueError(f"parity.json: expected a passed report, got max_error {report['max_error']}")
    return manifest


class Package:
    """The programs of an export: ``package.programs["prefill"](input_ids, state)``, or ``package.prefill(...)``."""

    def __init__(self, out_dir: str | Path) -> None:
        self.manifest = verify(out_dir)
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"out_dir: expected format {FORMAT} in {out_dir}, got {self.manifest['format']}")
        self.device = torch.device(self.manifest["device"])
        self.programs: dict[str, Callable] = {}
        for name, entry in self.manifest["programs"].items():
            loaded = torch._inductor.aoti_load_package(str(Path(out_dir) / entry["file"]))
            self.programs[name] = self._checked(name, entry, loaded)

    def _checked(self, name: str, entry: dict[str, Any], loaded: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            _check_inputs(name, entry, [x for x in leaves if torch.is_tensor(x)], self.device)
            leaves = [x.contiguous() if torch.is_tensor(x) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            return loaded(*args, **kwargs)

        return run

    def _program(self, name: str) -> Callable:
        if name not in self.programs:
            raise ValueError(f"package: expected a program {name!r}, got {', '.join(self.programs)}")
        return self.programs[name]

    def init_state(self, batch: int) -> dict[str, Tensor]:
        """The states before the first token, by dotted name."""
        states = [x for x in self.manifest["programs"]["prefill"]["inputs"] if x["role"] == "state"]
        return {
            x["name"]: torch.full(
                [batch if size == "batch" else size for size in x["shape"]],
                self.manifest["initial_state"][x["name"]],
                dtype=getattr(torch, x["dtype"]),
                device=self.device,
            )
            for x in states
        }

    def prefill(self, input_ids: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """``input_ids [batch, T]`` int64 to ``(logits, state)``; without ``state``, from :meth:`init_state`."""
        program = self._program("prefill")
        return program(input_ids, self.init_state(input_ids.shape[0]) if state is None else state)

    def step(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``input_ids [batch]`` int64 to ``(logits [batch, vocabulary], state)``."""
        return self._program("step")(input_ids, state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The program of a module that is no HybridLM."""
        return self._program("forward")(*args, **kwargs)


def _check_inputs(program: str, entry: dict[str, Any], tensors: list[Tensor], device: torch.device) -> None:
    expected = entry["inputs"]
    if len(tensors) != len(expected):
        raise ValueError(f"{program}: expected {len(expected)} tensors, got {len(tensors)}")
    sizes: dict[str, int] = {}
    for tensor, spec in zip(tensors, expected):
        name, dtype = spec["name"], getattr(torch, spec["dtype"])
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device.type != device.type:
            raise ValueError(f"{name}: expected a tensor on {device.type}, got {tensor.device}")
        fits = tensor.dim() == len(spec["shape"])
        for got, want in zip(tensor.shape, spec["shape"]):
            if isinstance(want, int):
                fits &= got == want
            elif want in entry["dynamic"]:
                bounds = entry["dynamic"][want]
                fits &= sizes.setdefault(want, got) == got >= bounds["min"]
                fits &= bounds["max"] is None or got <= bounds["max"]
        if not fits:
            known = f" with {sizes}" if sizes else ""
            raise ValueError(f"{name}: expected shape {spec['shape']}{known}, got {tuple(tensor.shape)}")


def load_package(out_dir: str | Path) -> Package:
    """Loads an export written by :func:`gdn_ops.export.export_aoti` after :func:`verify`.

    Raises ValueError if the folder is no export or a file of it has changed.

    Example::

        >>> package = load_package("out")  # doctest: +SKIP
        >>> logits, state = package.prefill(torch.zeros(1, 9, dtype=torch.long))  # doctest: +SKIP
        >>> logits, state = package.step(logits[:, -1].argmax(-1), state)  # doctest: +SKIP
    """
    return Package(out_dir)
