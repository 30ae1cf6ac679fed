"""Loads an export and runs it, with checks: files against their digests, inputs against the manifest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy
import torch
from gdn_ops.export.manifest import FORMAT, FORMAT_VERSION, FORMATS, sha256
from gdn_ops.export.program import by_name
from torch import Tensor
from torch.utils import _pytree as pytree

# Forms of JSON: the types of a value, or the forms of an object's fields ("*": of every one) or of a list's elements.
FILE = {"file": (str,), "size": (int,), "sha256": (str,)}
TENSOR = {"name": (str,), "role": (str,), "dtype": (str,), "shape": [(int, str)]}
PROGRAM = {**FILE, "inputs": [TENSOR], "dynamic": {"*": {"min": (int,), "max": (int, type(None))}}}
MANIFEST = {
    "target": (str,),
    "model": (str,),
    "config": (dict, type(None)),
    "device": (str,),
    "initial_state": (dict,),
    "programs": {"*": PROGRAM},
}
REPORT = {"passed": (bool,), "max_error": (int, float)}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        missing = f"expected an export with a {path.name}, got {path.parent} ({error.strerror})"
        raise ValueError(f"out_dir: {missing}") from None
    except ValueError as error:
        raise ValueError(f"out_dir: expected JSON in {path}, got {error}") from error


def _check_form(path: Path, value: Any, form: Any, name: str = "") -> None:
    """ValueError unless what ``path`` holds under ``name`` has ``form``."""
    kinds = form if isinstance(form, tuple) else (type(form),)
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"out_dir: expected {name or 'a'} {expected} in {path}, got {value!r:.80}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            _check_form(path, item, form[0], f"{name}.{index}")
    elif isinstance(form, dict):
        for key, inner in (dict.fromkeys(value, form["*"]) if "*" in form else form).items():
            full = f"{name}.{key}".removeprefix(".")
            if key not in value:
                raise ValueError(f"out_dir: expected {full} in {path}, got none")
            _check_form(path, value[key], inner, full)


def read_manifest(out_dir: str | Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError if ``out_dir`` is none, one of a newer format, or damaged."""
    path = Path(out_dir) / "manifest.json"
    manifest = _read(path)
    _check_form(path, manifest, {})
    version = manifest.get("format_version")
    if manifest.get("format") not in FORMATS or version != FORMAT_VERSION:
        got, expected = f"{manifest.get('format')} {version}", f"{' or '.join(FORMATS)} {FORMAT_VERSION}"
        raise ValueError(f"out_dir: expected format {expected} in {path}, got {got}")
    _check_form(path, manifest, MANIFEST)
    if "prefill" in manifest["programs"]:
        states = [x["name"] for x in manifest["programs"]["prefill"]["inputs"] if x["role"] == "state"]
        fills = dict.fromkeys(states, (int, float))
        _check_form(path, manifest, {"config": {"vocab_size": (int,)}, "initial_state": fills})
    return manifest


def verify(out_dir: str | Path) -> dict[str, Any]:
    """Checks size and SHA-256 of every file of an export and that its parity report passed; returns the manifest.

    Raises ValueError naming the file that is missing, damaged or different.
    """
    manifest, path = read_manifest(out_dir), Path(out_dir) / "parity.json"
    for name, program in manifest["programs"].items():
        data = program.get("data", [])
        _check_form(Path(out_dir) / "manifest.json", data, [FILE], f"programs.{name}.data")
        for entry in (program, *data):
            _check_file(Path(out_dir) / entry["file"], entry)
    report = _read(path)
    _check_form(path, report, REPORT)
    if not report["passed"]:
        raise ValueError(f"parity.json: expected a passed report, got max_error {report['max_error']}")
    return manifest


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"out_dir: expected the file {entry['file']}, got none in {path.parent}")
    if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
        raise ValueError(f"{entry['file']}: expected sha256 {entry['sha256']}, got another file")


class Package:
    """The programs of an export: ``package.programs["prefill"](input_ids, state)``, or ``package.prefill(...)``.

    Keyword arguments and keys of dicts are matched by name, in any order; ValueError for names that are not the traced.
    """

    def __init__(self, out_dir: str | Path, device: torch.device | str | None = None) -> None:
        self.manifest = verify(out_dir)
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"out_dir: expected format {FORMAT} in {out_dir}, got {self.manifest['format']}")
        self.device = _device(self.manifest["device"], device)
        index = -1 if self.device.index is None else self.device.index
        self.programs: dict[str, Callable] = {}
        for name, entry in self.manifest["programs"].items():
            loaded = torch._inductor.aoti_load_package(str(Path(out_dir) / entry["file"]), device_index=index)
            self.programs[name] = self._checked(name, entry, loaded)

    def _checked(self, name: str, entry: dict[str, Any], loaded: Callable) -> Callable:
        spec = pytree.treespec_loads(loaded.loader.get_call_spec()[0])
        args, kwargs = pytree.tree_unflatten(range(spec.num_leaves), spec)
        signature = _signature(entry, args, kwargs)
        expected = list(by_name(signature.bind(*args, **kwargs).arguments))
        labels, constants = entry.get("arguments", expected), entry.get("constants", {})
        written = [i for i, label in enumerate(labels) if label in entry.get("writes", ())]

        def in_order(*args: Any, **kwargs: Any) -> list[Any]:
            try:
                given = by_name(signature.bind(*args, **kwargs).arguments)
            except TypeError as error:
                raise ValueError(f"{name}: expected arguments {signature}, got others: {error}") from error
            if given.keys() != set(expected):
                missing = ", ".join(x for x in expected if x not in given) or "no other inputs"
                unknown = ", ".join(x for x in given if x not in expected) or "none"
                raise ValueError(f"{name}: expected {missing}, got {unknown}")
            return [given[x] for x in expected]

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, given = pytree.tree_flatten((args, kwargs))
            leaves = leaves if given == spec else in_order(*args, **kwargs)
            _check_constants(constants, dict(zip(labels, leaves)))
            _check_inputs(name, entry, [x for x in leaves if torch.is_tensor(x)], self.device)
            passed = [x.contiguous() if torch.is_tensor(x) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(passed, spec)
            results = loaded(*args, **kwargs)
            for i in written:
                if passed[i] is not leaves[i]:
                    leaves[i].copy_(passed[i])
            return results

        return run

    def _program(self, name: str) -> Callable:
        if name not in self.programs:
            raise ValueError(f"package: expected a program {name!r}, got {', '.join(self.programs)}")
        return self.programs[name]

    def init_state(self, batch: int) -> dict[str, Tensor]:
        """The states before the first token, by dotted name."""
        self._program("prefill")
        if not isinstance(batch, int) or isinstance(batch, bool):
            raise TypeError(f"batch: expected an integer, got {type(batch).__name__}")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
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
        if not torch.is_tensor(input_ids):
            raise TypeError(f"input_ids: expected a tensor, got {type(input_ids).__name__}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape [batch, T], got {tuple(input_ids.shape)}")
        return program(input_ids, self.init_state(input_ids.shape[0]) if state is None else state)

    def step(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``input_ids [batch]`` int64 to ``(logits [batch, vocabulary], state)``."""
        return self._program("step")(input_ids, state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The program of a module that is no HybridLM."""
        return self._program("forward")(*args, **kwargs)


def _device(exported: str, device: torch.device | str | None) -> torch.device:
    """Where a package runs: a device of the kind that it was exported for, the current one unless it is given."""
    chosen = torch.device(exported if device is None else device)
    if chosen.type != exported:
        raise ValueError(f"device: expected {exported}, which the package was exported for, got {chosen}")
    if chosen.type != "cuda":
        return torch.device(chosen.type)
    return torch.device("cuda", torch.cuda.current_device()) if chosen.index is None else chosen


def _signature(entry: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> inspect.Signature:
    """Of a program traced with ``args`` and ``kwargs``. Positions have names where the manifest tells them all."""
    kind, names = inspect.Parameter.POSITIONAL_OR_KEYWORD, entry.get("parameters", [])
    if len(names) != len(args):
        kind, names = inspect.Parameter.POSITIONAL_ONLY, [f"input_{i}" for i in range(len(args))]
    parameters = [inspect.Parameter(name, kind) for name in names]
    return inspect.Signature([*parameters, *(inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY) for x in kwargs)])


def _check_constants(constants: dict[str, Any], given: dict[str, Any]) -> None:
    """What the program was made with cannot be another thing now."""
    for name, expected in constants.items():
        got = given.get(name)
        if got != expected and repr(got) not in (expected, repr(expected)):
            raise ValueError(f"{name}: expected {expected}, as in the example of the export, got {got!r}")


def _check_inputs(program: str, entry: dict[str, Any], tensors: list[Tensor], device: torch.device) -> None:
    expected = entry["inputs"]
    if len(tensors) != len(expected):
        raise ValueError(f"{program}: expected {len(expected)} tensors, got {len(tensors)}")
    sizes: dict[str, int] = {}
    for tensor, spec in zip(tensors, expected):
        name, dtype = spec["name"], getattr(torch, spec["dtype"])
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
        fits = tensor.dim() == len(spec["shape"])
        for got, want in zip(tensor.shape, spec["shape"]):
            fits &= got == want if isinstance(want, int) else _fits(got, want, entry["dynamic"], sizes)
        if not fits:
            known = f" with {sizes}" if sizes else ""
            raise ValueError(f"{name}: expected shape {spec['shape']}{known}, got {tuple(tensor.shape)}")


def _fits(got: int, want: str, dynamic: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Whether a size is ``want``, a name of ``dynamic`` or an expression in them; ``sizes`` gets that of the name."""
    if want not in dynamic:
        symbols = {name: sympy.Symbol(name) for name in dynamic}
        expression = sympy.sympify(want, locals=symbols).subs({symbols[name]: size for name, size in sizes.items()})
        free = [str(x) for x in expression.free_symbols]
        if len(free) != 1 or free[0] not in dynamic:
            return bool(free) or expression == got
        want = free[0]
        solutions = [x for x in sympy.solve(expression - got, symbols[want]) if x.is_Integer]
        if not solutions:
            return False
        got = int(max(solutions))
    bounds = dynamic[want]
    return sizes.setdefault(want, got) == got >= bounds["min"] and (bounds["max"] is None or got <= bounds["max"])


def load_package(out_dir: str | Path, device: torch.device | str | None = None) -> Package:
    """Loads an export written by :func:`gdn_ops.export.export_aoti` after :func:`verify`.

    ``device`` is of the kind that it was exported for: one of several GPUs, as ``"cuda:1"``; None: the current one.

    Raises ValueError if the folder is no export, a file of it has changed, or ``device`` is of another kind.

    Example::

        >>> package = load_package("out")  # doctest: +SKIP
        >>> logits, state = package.prefill(torch.zeros(1, 9, dtype=torch.long))  # doctest: +SKIP
        >>> logits, state = package.step(logits[:, -1].argmax(-1), state)  # doctest: +SKIP
    """
    return Package(out_dir, device)
