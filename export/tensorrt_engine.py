"""An ONNX file becomes a serialized engine: parsed, held against the manifest, given its profiles, built, reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from gdn_ops.export.tensorrt_runtime import Options, Runtime, configure, listener, this_gpu

from gdn_ops.files import write_file

Profiles = dict[str, dict[str, tuple[int, int, int]]]
# Of a language model, unless the caller has others: 8 rows at most, prompts of up to 4096 tokens.
BATCH, PROMPT = (1, 1, 8), (2, 512, 4096)
_BOUNDS = ("min", "opt", "max")


def default_profiles() -> Profiles:
    """``decode`` is one token a row, ``prefill`` any length."""
    return {"decode": {"batch": BATCH, "T": (1, 1, 1)}, "prefill": {"batch": BATCH, "T": PROMPT}}


def check_profiles(profiles: Any, dynamic: Mapping[str, Mapping[str, Any]]) -> Profiles:
    """Every profile with ``(min, opt, max)`` for every dynamic size of the manifest; ValueError or TypeError if not."""
    if not isinstance(profiles, Mapping) or not profiles:
        raise TypeError(f"profiles: expected a dict of profiles by name, got {profiles!r}")
    checked: Profiles = {}
    for name, sizes in profiles.items():
        if not isinstance(sizes, Mapping):
            raise TypeError(f"profiles[{name!r}]: expected a dict of sizes by name, got {sizes!r}")
        missing, unknown = [x for x in dynamic if x not in sizes], [x for x in sizes if x not in dynamic]
        if missing or unknown:
            got = ", ".join(map(str, sizes)) or "none"
            raise ValueError(f"profiles[{name!r}]: expected the sizes {', '.join(dynamic) or 'none'}, got {got}")
        checked[name] = {x: _range(f"profiles[{name!r}][{x!r}]", sizes[x], dynamic[x]) for x in dynamic}
    return checked


def _range(where: str, given: Any, bounds: Mapping[str, Any]) -> tuple[int, int, int]:
    given = (given,) * 3 if isinstance(given, int) else given
    sizes = tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(x, int) and not isinstance(x, bool) for x in sizes):
        raise TypeError(f"{where}: expected an integer or (min, opt, max), got {given!r}")
    smallest, largest = bounds["min"], bounds["max"]
    if not sizes[0] <= sizes[1] <= sizes[2]:
        raise ValueError(f"{where}: expected min <= opt <= max, got {sizes}")
    if sizes[0] < smallest or (largest is not None and sizes[2] > largest):
        upper = "" if largest is None else f" to {largest}"
        raise ValueError(f"{where}: expected sizes from {smallest}{upper}, got {sizes}")
    return sizes  # type: ignore[return-value]


def profile_shapes(inputs: list[dict[str, Any]], sizes: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, list]]:
    """``{input: {"min": shape, "opt": shape, "max": shape}}``; a shape may hold expressions of the sizes."""

    def shape(described: dict[str, Any], index: int) -> list[int]:
        at = {sympy.Symbol(name): bounds[index] for name, bounds in sizes.items()}
        named = {str(symbol): symbol for symbol in at}
        return [int(sympy.sympify(size, locals=named).subs(at)) for size in described["shape"]]

    return {x["name"]: {bound: shape(x, i) for i, bound in enumerate(_BOUNDS)} for x in inputs}


class Engine(NamedTuple):
    """``described`` goes into the manifest, ``layers`` is the layer report."""

    path: Path
    described: dict[str, Any]
    layers: dict[str, Any]


def build_engine(
    runtime: Runtime,
    graph: Path,
    entry: dict[str, Any],
    profiles: Profiles,
    options: Options,
    path: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> Engine:
    """Builds the engine of the ONNX file ``graph``, which ``entry`` describes, and writes it to ``path``.

    Raises ValueError with the parser's messages if it cannot read the file, and RuntimeError with the builder's if
    there is no engine.
    """
    trt, said = runtime.trt, _Said(runtime.trt)
    builder = trt.Builder(said.logger)
    network = builder.create_network(_network_flags(runtime))
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        listed = "; ".join(f"{x.node_name() or 'graph'}: {x.desc()}" for x in errors) or said.last()
        raise ValueError(f"model: the ONNX parser of {runtime.name} {runtime.version} cannot read the file: {listed}")
    bindings = check_bindings(trt, network, entry)
    config = builder.create_builder_config()
    chosen = configure(runtime, config, options)
    shapes = {}
    for name, sizes in profiles.items():
        shapes[name] = profile_shapes(entry["inputs"], sizes)
        profile = builder.create_optimization_profile()
        for tensor, bounds in shapes[name].items():
            profile.set_shape(tensor, *(bounds[bound] for bound in _BOUNDS))
        if config.add_optimization_profile(profile) < 0:
            raise ValueError(f"profiles[{name!r}]: refused by {runtime.name}: {said.last()}")
    cache = _open_cache(config, options.timing_cache)
    # The builder holds no reference to its monitor.
    monitor = config.progress_monitor = listener(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if monitor.raised is not None:
        raise monitor.raised
    if plan is None:
        raise RuntimeError(f"{runtime.name} {runtime.version} built no engine: {said.last()}")
    with open(path, "wb") as file:
        file.write(plan)
    if cache is not None:
        write_file(Path(options.timing_cache), bytes(cache.serialize()))
    described = {
        **chosen,
        "this_gpu": this_gpu(runtime, chosen.get("compute_capabilities")),
        "strongly_typed": True,
        "profiles": [
            {"name": name, "index": i, "sizes": {n: list(x) for n, x in profiles[name].items()}, "inputs": shapes[name]}
            for i, name in enumerate(profiles)
        ],
        "bindings": bindings,
        "timing_cache": None if options.timing_cache is None else Path(options.timing_cache).name,
        "warnings": said.warnings(),
    }
    layers = layer_report(runtime, network, plan, said)
    return Engine(path, described | {"inspected": layers["inspector"]["available"]}, layers)


class _Said:
    """The builder's messages, kept instead of printed."""

    def __init__(self, trt: Any) -> None:
        kept: list[tuple[Any, str]] = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    kept.append((severity, " ".join(message.split())))

        self.trt, self.kept, self.logger = trt, kept, Logger()

    def last(self) -> str:
        """The last error."""
        errors = [message for severity, message in self.kept if severity <= self.trt.ILogger.ERROR]
        return errors[-1] if errors else "it gave no reason"

    def warnings(self) -> list[str]:
        """Each warning once; the parser remarks on every node of a function that is called twice."""
        found = [message for severity, message in self.kept if severity == self.trt.ILogger.WARNING]
        return sorted({x for x in found if "already exists, the output tensors of this new instance" not in x})


def _network_flags(runtime: Runtime) -> int:
    flags = runtime.trt.NetworkDefinitionCreationFlag
    wanted = ["STRONGLY_TYPED"]
    if runtime.plugins:
        wanted.append("PREFER_AOT_PYTHON_PLUGINS")
    return sum(1 << int(getattr(flags, name)) for name in wanted if hasattr(flags, name))


def dtype_name(trt: Any, dtype: Any) -> str:
    """A TensorRT dtype by torch's name."""
    names = {
        trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16", trt.int64: "int64",
        trt.int32: "int32", trt.int8: "int8", trt.bool: "bool",
    }  # fmt: skip
    return names.get(dtype, str(dtype))


def check_bindings(trt: Any, network: Any, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Inputs and outputs of the network, in order; RuntimeError unless they are the manifest's."""

    def found(tensor: Any, mode: str) -> dict[str, Any]:
        return {
            "name": tensor.name, "mode": mode, "dtype": dtype_name(trt, tensor.dtype), "shape": list(tensor.shape),
        }  # fmt: skip

    bindings = [found(network.get_input(i), "input") for i in range(network.num_inputs)]
    bindings += [found(network.get_output(i), "output") for i in range(network.num_outputs)]
    wanted = [
        {**{key: x[key] for key in ("name", "dtype")}, "mode": mode,
         "shape": [size if isinstance(size, int) else -1 for size in x["shape"]]}
        for mode in ("input", "output") for x in entry[f"{mode}s"]
    ]  # fmt: skip
    # An output's size may be open to the parser where the file has it.
    for got, want in zip(bindings, wanted):
        sizes = list(zip(got["shape"], want["shape"]))
        fits = len(got["shape"]) == len(want["shape"]) and all(a in (-1, b) for a, b in sizes)
        if not fits or any(got[key] != want[key] for key in ("name", "dtype", "mode")):
            raise RuntimeError(f"network: expected the {want['mode']} {want}, got {got}")
    if len(bindings) != len(wanted):
        raise RuntimeError(f"network: expected {len(wanted)} inputs and outputs, got {len(bindings)}")
    return bindings


def _open_cache(config: Any, path: Any) -> Any:
    if path is None:
        return None
    path = Path(path)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(f"timing_cache: expected a cache of this TensorRT on this GPU, got {path}")
    return cache


def layer_report(runtime: Runtime, network: Any, plan: Any, said: _Said) -> dict[str, Any]:
    """The network's layers, and what the engine's inspector says of the fused ones where the engine can be loaded."""
    trt = runtime.trt
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "outputs": [{"dtype": dtype_name(trt, x.dtype), "shape": _dims(x)} for x in outputs if x is not None],
            }
        )
    types: dict[str, int] = {}
    for layer in layers:
        types[layer["type"]] = types.get(layer["type"], 0) + 1
    return {"types": dict(sorted(types.items())), "layers": layers, "inspector": _inspect(runtime, plan, said)}


def _dims(tensor: Any) -> list[int] | None:
    """None where the parser cannot tell how many dimensions there are."""
    try:
        return list(tensor.shape)
    except ValueError:
        return None


def _inspect(runtime: Runtime, plan: Any, said: _Said) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"available": False, "reason": "the inspector reads a loaded engine, and torch sees no GPU to load it"}
    engine = runtime.trt.Runtime(said.logger).deserialize_cuda_engine(plan)
    if engine is None:
        name = torch.cuda.get_device_name()
        return {"available": False, "reason": f"the engine does not load on {name}: {said.last()}"}
    text = engine.create_engine_inspector().get_engine_information(runtime.trt.LayerInformationFormat.JSON)
    return {"available": True, "engine": json.loads(text)}
