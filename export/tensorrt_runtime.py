"""Which TensorRT builds the engine, and what it can do: the full one, or TensorRT-RTX from the package index.

| | TensorRT (``tensorrt``) | TensorRT-RTX (``tensorrt_rtx``) |
|---|---|---|
| where from | NVIDIA | the package index |
| builds without a GPU | no | yes, for the GPUs that are named |
| plugins | yes | no: the operators are in the portable form |
| runs on | the GPU that built it | compute capability 8.0, 8.6, 8.9 and 12.x; not on Hopper (9.0) or on 10.x |
| timing cache, version and hardware compatibility | yes | no (it compiles kernels on the GPU that runs the engine) |

Nothing here is imported before an engine is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST = {"tensorrt": (10, 9), "tensorrt-rtx": (1, 7)}
# Its quick plugins are broken (NVIDIA's release notes of 10.14).
WITHOUT_PLUGINS = (10, 14)
# It has no fp32 product for Turing, and the rule is fp32 whatever the weights are.
TOO_OLD = ("SM75",)
GET = {
    "tensorrt": "install TensorRT from NVIDIA (pip install 'gdn-ops[tensorrt]' where NVIDIA's index is configured)",
    "tensorrt-rtx": "pip install 'gdn-ops[tensorrt-rtx]'",
}


class Runtime(NamedTuple):
    """``trt`` is the imported package; ``reason`` says why it is this one."""

    name: str
    trt: ModuleType
    version: str
    reason: str

    @property
    def plugins(self) -> bool:
        return self.name == "tensorrt"


def find(runtime: str | None) -> Runtime:
    """The TensorRT to build with: ``runtime``, or the full one where it can build, else TensorRT-RTX.

    Raises:
        ValueError: ``runtime`` unknown, or a version that is too old or cannot load plugins.
        ModuleNotFoundError: not installed; the message says how to install it.
        RuntimeError: installed, but it does not load, or it needs a GPU that is not there.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise ValueError(f"runtime: expected one of {', '.join(RUNTIMES)} or None, got {runtime!r}")
    if runtime is not None:
        return _load(runtime, f"runtime={runtime!r} was asked for")
    try:
        return _load("tensorrt", "full TensorRT is installed, and a GPU is there: the operators become plugins")
    except ModuleNotFoundError:
        why = "it is not installed"
    except (RuntimeError, ValueError) as error:
        why = str(error).removeprefix("runtime: ").split(";")[0]
    try:
        portable = "TensorRT-RTX takes no plugins, so the operators are in portable form"
        return _load("tensorrt-rtx", f"full TensorRT cannot be used here ({why}); {portable}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"runtime: build_tensorrt needs tensorrt_rtx or tensorrt, got neither ({why}): {GET['tensorrt-rtx']} (it "
            "builds engines for GPUs of compute capability 8.0, 8.6, 8.9 and 12.x on any machine), or, for other "
            f"GPUs, {GET['tensorrt']}",
            name=error.name,
        ) from error


def _load(name: str, reason: str) -> Runtime:
    module = RUNTIMES[name]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise RuntimeError(_broken(name, error)) from error
        raise ModuleNotFoundError(f"runtime: build_tensorrt needs {module}: {GET[name]}", name=module) from error
    except (ImportError, OSError) as error:
        raise RuntimeError(_broken(name, error)) from error
    version = trt.__version__
    found, oldest = _numbers(version), OLDEST[name]
    if found < oldest:
        raise ValueError(
            f"runtime: expected {name} {'.'.join(map(str, oldest))} or later, got {version}; {GET[name]}, after "
            f"pip uninstall {name}"
        )
    if name == "tensorrt":
        if found[:2] == WITHOUT_PLUGINS:
            raise ValueError(f"runtime: expected a tensorrt whose Python plugins work, got {version}; take another one")
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"runtime: tensorrt {version} builds on the GPU that will run the engine, and torch sees none; build "
                "there, or use runtime='tensorrt-rtx', which needs no GPU to build"
            )
    return Runtime(name, trt, version, reason)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _broken(name: str, error: Exception) -> str:
    packages = [x for x in (name, f"{name}-cu13", f"{name}-cu12", f"{name}-cu13-libs") if _version(x)]
    installed = ", ".join(f"{x} {_version(x)}" for x in packages) or "a package without metadata"
    return f"runtime: {RUNTIMES[name]} ({installed}) does not load: {error}; {GET[name]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Options(NamedTuple):
    """What :func:`gdn_ops.export.build_tensorrt` was asked for beside the model."""

    compute_capabilities: tuple[str, ...] | None = None
    hardware_compatible: str | None = None
    version_compatible: bool = False
    timing_cache: Any = None
    optimization_level: int | None = None


HARDWARE = ("ampere_plus", "same_compute_capability")


def check_options(runtime: Runtime, options: Options) -> None:
    """ValueError for what this TensorRT has not, with the reason and what to use instead."""
    level = options.optimization_level
    if level is not None and (not isinstance(level, int) or not 0 <= level <= 5):
        raise ValueError(f"optimization_level: expected an integer from 0 to 5, got {level!r}")
    if options.hardware_compatible is not None and options.hardware_compatible not in HARDWARE:
        raise ValueError(
            f"hardware_compatible: expected one of {', '.join(HARDWARE)} or None, got {options.hardware_compatible!r}"
        )
    if runtime.plugins:
        if options.compute_capabilities is not None:
            raise ValueError(
                f"compute_capabilities: TensorRT {runtime.version} builds for the GPU that it runs on; expected None, "
                f"got {options.compute_capabilities!r}: use hardware_compatible, or runtime='tensorrt-rtx'"
            )
        return
    lacking = {
        "timing_cache": "it times nothing while it builds: keep its runtime cache where the engine runs",
        "version_compatible": "an engine is read by the version that built it: build again from model.onnx",
        "hardware_compatible": "the GPUs are named one by one: use compute_capabilities",
    }
    for name, instead in lacking.items():
        if getattr(options, name):
            raise ValueError(f"{name}: TensorRT-RTX {runtime.version} has no such thing; {instead}")
    _capabilities(runtime, options.compute_capabilities)


def known_capabilities(trt: ModuleType) -> dict[str, Any]:
    """The compute capabilities that this TensorRT-RTX builds for, as ``"sm_89"``."""
    names = (name for name in dir(trt.ComputeCapability) if name.startswith("SM") and name not in TOO_OLD)
    return {f"sm_{name[2:]}": getattr(trt.ComputeCapability, name) for name in names}


def _capabilities(runtime: Runtime, wanted: tuple[str, ...] | None) -> list[str]:
    known = known_capabilities(runtime.trt)
    if wanted is None:
        return list(known)
    for name in wanted:
        if name not in known:
            hints = {"sm_9": "; Hopper needs full TensorRT", "sm_7": ", because it has no float32 product below sm_80"}
            hint = next((hint for start, hint in hints.items() if name.startswith(start)), "")
            builds = f"TensorRT-RTX {runtime.version} builds for {', '.join(known)}{hint}"
            raise ValueError(f"compute_capabilities: {builds}; got {name!r}")
    if not wanted:
        raise ValueError(f"compute_capabilities: expected some of {', '.join(known)}, got none")
    return list(dict.fromkeys(wanted))


def configure(runtime: Runtime, config: Any, options: Options) -> dict[str, Any]:
    """Sets the builder's configuration; returns what was set, for the manifest."""
    trt = runtime.trt
    # Inputs in fp32 mean fp32 accuracy; both builders would use TF32.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    chosen: dict[str, Any] = {"tf32": False}
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    chosen["optimization_level"] = config.builder_optimization_level
    if not runtime.plugins:
        known, wanted = known_capabilities(trt), _capabilities(runtime, options.compute_capabilities)
        config.num_compute_capabilities = len(wanted)
        for index, name in enumerate(wanted):
            config.set_compute_capability(known[name], index)
        return {**chosen, "compute_capabilities": wanted}
    if options.hardware_compatible is not None:
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper())
        config.hardware_compatibility_level = level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    return {
        **chosen,
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
    }


def this_gpu(runtime: Runtime, capabilities: list[str] | None) -> str | None:
    """The GPU that torch sees, and whether the engine is for it; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    if runtime.plugins or f"sm_{major}{minor}" in (capabilities or ()):
        return f"{name}: the engine is for it"
    known = f"sm_{major}{minor}" in known_capabilities(runtime.trt)
    return f"{name}: " + ("the engine is for others" if known else "TensorRT-RTX does not run on it; use full TensorRT")


def listener(trt: ModuleType, progress: Callable[[str, int, int], None] | None) -> Any:
    """An ``IProgressMonitor`` that tells ``progress(phase, done, steps)``; what that raises stops the build.

    ``raised`` is the exception, to be raised again once the builder has returned.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.raised: BaseException | None = None

        def tell(self, phase: str, done: int) -> None:
            # The builder calls from C++, which an exception must not cross.
            try:
                if progress is not None and self.raised is None:
                    progress(phase, done, self.steps[phase])
            except BaseException as error:
                self.raised = error

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self.tell(phase_name, self.steps[phase_name])

    return Monitor()
