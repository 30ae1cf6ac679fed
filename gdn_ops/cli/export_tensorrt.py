"""``gdn export --target tensorrt``: one engine, and what its options mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gdn_ops.cli.errors import Failure, UserError, at_the_door, need

if TYPE_CHECKING:
    from torch import nn

    from gdn_ops.cli.measure import Row

DEFAULT_BATCH, DEFAULT_LENGTH = 8, 4096


class EngineOptions(NamedTuple):
    """Options of the command that only an engine takes; None is what was not given."""

    runtime: str | None = None
    compute_capabilities: list[str] | None = None
    max_batch: int | None = None
    max_length: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: str | None = None
    version_compatible: bool | None = None

    def refuse_unless(self, target: str) -> None:
        """With another target they would mean nothing."""
        given = [name for name, value in self._asdict().items() if value]
        if given and target != "tensorrt":
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{option}: expected it with --target tensorrt only, got --target {target}")

    def profiles(self) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Profile 0 decodes, profile 1 prefills; both are best for one row, the latter for 512 tokens."""
        length = self.max_length or DEFAULT_LENGTH
        batch = (1, 1, self.max_batch or DEFAULT_BATCH)
        return {
            "decode": {"batch": batch, "T": (1, 1, 1)},
            "prefill": {"batch": batch, "T": (min(2, length), min(512, length), length)},
        }


def write(
    model: nn.Module, out: Path, options: EngineOptions, progress: Callable[[str, int, int], None]
) -> Callable[[Path], list[Row]]:
    """Writes the engine's folder; gives the function that measures eager, beside which the engine is only listed."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library, "gdn export --target tensorrt", "onnx")
    from gdn_ops.export import ParityError, build_tensorrt

    capabilities = tuple(options.compute_capabilities) if options.compute_capabilities else None
    try:
        with at_the_door():
            result = build_tensorrt(
                model, out, runtime=options.runtime, profiles=options.profiles(), compute_capabilities=capabilities,
                timing_cache=options.timing_cache, hardware_compatible=options.hardware_compatible,
                version_compatible=bool(options.version_compatible), progress=progress,
            )  # fmt: skip
    except ParityError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if str(error).startswith("runtime: "):
            raise UserError(" ".join(str(error).split())) from error
        raise Failure(f"no engine; nothing was written: {error}") from error
    file = result.files["model.engine"]
    return lambda directory: _rows(model, directory, (file.name, file.stat().st_size), result.report)


def _rows(model: nn.Module, directory: Path, file: tuple[str, int], parity: dict[str, Any]) -> list[Row]:
    from gdn_ops.cli import measure

    device = next(model.parameters()).device
    speeds = measure.speeds({"eager": model}, device, model.config.vocab_size)["eager"]
    errors, weights = measure.parities(parity["cases"]), directory / "model.safetensors"
    rows = [measure.Row("eager", x, weights.name, weights.stat().st_size, None, speed) for x, speed in speeds.items()]
    return rows + [measure.Row("tensorrt", x, *file, errors[x], None) for x in speeds]
