"""A HybridLM's graph, put together from parts: its ends, and one layer of each kind, for the prefill and for a step.

Tracing takes a time that grows with the layers (twelve took forty seconds), and the layers of a model are one or two
kinds with other weights. So the parts are traced, once, side by side; then the nodes of each are repeated wherever the
model has that part, over its own weights. What layers compute alike, such as rotary angles and masks, is computed once.
The numbers are proved on the whole file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import onnx_ir as ir
import torch
from gdn_ops.export import manifest as manifests
from gdn_ops.export import onnx_graph
from gdn_ops.export.onnx_branches import join
from gdn_ops.export.program import Plan, export_plan
from torch import Tensor, nn

EMBEDDING, HEAD = "embedding", "head"


class _Parts(nn.Module):
    """Every part on inputs of its own.

    A step takes the first token of ``input_ids [B, T]``, and gives T times its logits. T is 1 where a step is taken,
    but TensorRT works out the shapes of both branches at any length, and must find the same ones.
    """

    def __init__(self, model: nn.Module, kinds: list[int]) -> None:
        super().__init__()
        self.model, self.kinds = model, kinds

    def forward(
        self, input_ids: Tensor, streams: dict[str, Tensor], states: dict[str, dict[str, Tensor]], position: Tensor
    ) -> dict[str, dict[str, Any]]:
        model, T = self.model, input_ids.shape[1]
        parts = {}
        for name, x in streams.items():
            step = name == "step"
            part = {EMBEDDING: {"x": model.embedding(input_ids[:, :1] if step else input_ids)}}
            for index in self.kinds:
                own = {**states[str(index)], "position": position}
                own = {name: own[name] for name in model.layers[index].mixer.state_names}
                y, new = model.layers[index](x, state=own)
                part[f"layers.{index}"] = {"x": y} | {name: z for name, z in new.items() if name != "position"}
            logits = model._logits(model.norm(x))
            part[HEAD] = {
                "logits": logits.expand(-1, T, -1) if step else logits,
                "position": position + (1 if step else T),
            }
            parts[name] = part
        return parts


def language_model(item: Plan, target: str) -> tuple[ir.Model, dict[str, Any]]:
    """The graph of the HybridLM of ``item``, which is its plan of the prefill, and what the manifest says of it.

    It takes ``input_ids [batch, T]`` and every state and gives the logits ``[batch, T, vocabulary]`` and every new
    state, named ``present.<state>``.
    """
    parts = _Traced(item, target)
    return join(parts.put_together("prefill"), parts.put_together("step")), parts.entry


def kinds(layers: nn.ModuleList) -> list[int]:
    """For each layer the number of the first that differs from it in nothing but the values of its weights.

    A layer that shares some of them with another is a kind of its own: the trace has a weight once, by one name.
    """
    tensors = {layer: {id(x) for x in (*layer.parameters(), *layer.buffers())} for layer in layers}
    owners = Counter(itertools.chain(*tensors.values()))
    sharing = {layer for layer, own in tensors.items() if any(owners[x] > 1 for x in own)}

    def alike(a: nn.Module, b: nn.Module) -> bool:
        return a is b or (not {a, b} & sharing and _alike(a, b))

    return [next(j for j, other in enumerate(layers) if alike(layer, other)) for layer in layers]


def _alike(a: nn.Module | None, b: nn.Module | None) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys() or a._modules.keys() != b._modules.keys():
        return False
    weights = [{name: x if x is None else (x.shape, x.dtype) for name, x in _own_tensors(m).items()} for m in (a, b)]
    plain = vars(a).keys() - {"_parameters", "_buffers", "_modules"}
    same = weights[0] == weights[1] and all(_equal(vars(a)[name], vars(b)[name]) for name in plain)
    return same and all(_alike(x, y) for x, y in zip(a._modules.values(), b._modules.values()))


def _own_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except (RuntimeError, ValueError):  # tensors and arrays, which the trace would hold as constants
        return False


class _Traced:
    """The parts of a model in one graph, and what to make of them."""

    def __init__(self, item: Plan, target: str) -> None:
        self.lm, (ids, state) = item.module.model, item.args
        self.kinds = kinds(self.lm.layers)
        traced = sorted(set(self.kinds))
        ids_dims, batch = item.dynamic_shapes[0], {0: item.dynamic_shapes[0][0]}
        x = torch.zeros(*ids.shape, self.lm.config.hidden_size, dtype=self.lm.embedding.weight.dtype)
        streams, stream_dims = {"prefill": x, "step": x[:, :1].contiguous()}, {"prefill": ids_dims, "step": batch}
        own = {str(i): {name: state[f"layers.{i}.{name}"] for name in self._own(i)} for i in traced}
        own_dims = {i: dict.fromkeys(states, batch) for i, states in own.items()}
        inputs = ["input_ids", *streams, *(f"layers.{i}.{name}" for i in own for name in own[i]), "position"]
        args, dims = (ids, streams, own, state["position"]), (ids_dims, stream_dims, own_dims, batch)
        plan = Plan(_Parts(self.lm, traced), args, {}, dims, inputs, [])
        program = export_plan(plan)
        described = manifests.describe_program(plan, program)
        self.model = onnx_graph.translate("prefill", plan, program, described["operators"])
        self.weights = self._open(target)
        onnx_graph.name(self.model, plan, program, described)
        self.entry = self._describe(described, list(state))
        tensors = (*self.lm.named_parameters(remove_duplicate=False), *self.lm.named_buffers(remove_duplicate=False))
        self.tensors = {f"model.{name}": tensor for name, tensor in tensors}
        self.shared: dict[int, ir.TensorProtocol] = {}

    def _own(self, index: int) -> list[str]:
        """Names of a layer's states; the position is kept once for all."""
        return [name for name in self.lm.layers[index].mixer.state_names if name != "position"]

    def _open(self, target: str) -> dict[str, ir.TensorProtocol]:
        """Simplifies the graph without folding anything that another layer has other numbers for: as far as it knows,
        weights are inputs. Returns the tensors that it was traced with."""
        graph, weights = self.model.graph, {}
        count = len(graph.inputs)
        for name, value in list(graph.initializers.items()):
            weights[name], value.const_value = value.const_value, None
            del graph.initializers[name]
            graph.inputs.append(value)
        onnx_graph.simplify(self.model, target)
        del graph.inputs[count:]
        return weights

    def _describe(self, described: dict[str, Any], states: list[str]) -> dict[str, Any]:
        """The entry of the whole program, from that of the parts."""
        found = {x["name"]: x for x in described["inputs"]}
        for index, kind in enumerate(self.kinds):
            found |= {f"layers.{index}.{name}": found[f"layers.{kind}.{name}"] for name in self._own(index)}
        inputs = [{**found[name], "name": name, "role": "state"} for name in states]
        (logits,) = (x for x in described["outputs"] if x["name"] == "prefill.head.logits")
        results = {name: f"present.{name}" for name in states}
        return {
            **described,
            "inputs": [found["input_ids"], *inputs],
            "outputs": [{**logits, "name": "logits"}, *({**x, "name": results[x["name"]]} for x in inputs)],
            "states": results,
        }

    def put_together(self, program: str) -> ir.Model:
        """``prefill`` or ``step``."""
        graph = ir.Graph([], [], nodes=[], opset_imports=dict(self.model.opset_imports), name=program)
        values = {x["name"]: _input(x) for x in self.entry["inputs"]}
        graph.inputs.extend(values.values())
        found, results = self._add(graph, program, EMBEDDING, EMBEDDING, values), {}
        for index, kind in enumerate(self.kinds):
            given = {f"layers.{kind}.{name}": values[f"layers.{index}.{name}"] for name in self._own(index)}
            given = {**values, **given, program: found["x"]}
            found = self._add(graph, program, f"layers.{kind}", f"layers.{index}", given)
            results |= {f"layers.{index}.{name}": found[name] for name in self._own(index)}
        results |= self._add(graph, program, HEAD, HEAD, {**values, program: found["x"]})
        graph.outputs.extend([results["logits"], *(results[name] for name in self.entry["states"])])
        for value, described in zip(graph.outputs, self.entry["outputs"]):
            value.name = described["name"]
        model = ir.Model(graph, ir_version=self.model.ir_version)
        onnx_graph.share(model)
        return model

    def _add(
        self, graph: ir.Graph, program: str, part: str, name: str, given: dict[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """Appends the nodes of ``part`` of ``program`` as those of the model's part ``name``, over its weights, and
        returns its outputs; ``given`` stands for the inputs of the graph that was traced."""
        start = f"{program}.{part}."
        ends = [value for value in self.model.graph.outputs if value.name.startswith(start)]
        nodes, sources = _upstream(self.model.graph, ends)
        copy = ir.GraphView(sources, ends, nodes=nodes).clone()
        for own, source in zip(list(copy.inputs), sources):
            value = given.get(source.name)
            if value is None:
                value = self._constant(graph, source, source.name.replace(f"model.{part}.", f"model.{name}.", 1))
            own.replace_all_uses_with(value)
        copy.inputs.clear()
        for number, node in enumerate(ir.traversal.RecursiveGraphIterator(copy)):
            node.name = f"{name}.{node.name or number}"
            for value in node.outputs:
                value.name = f"{name}.{value.name.removeprefix(start)}"
        results, nodes = list(copy.outputs), list(copy)
        copy.outputs.clear()
        copy.remove(nodes)
        graph.extend(nodes)
        return {end.name.removeprefix(start): result for end, result in zip(ends, results)}

    def _constant(self, graph: ir.Graph, source: ir.Value, name: str) -> ir.Value:
        """A weight, or a number that the exporter made; both programs have the same tensor, if not the same value."""
        tensor = source.const_value
        if source.name in self.weights:
            own = self.tensors.get(name)
            key, tensor = id(own), self.weights[source.name]
            if own is not None:
                tensor = self.shared.setdefault(key, ir.tensor_adapters.TorchTensor(own.detach()))
        if name not in graph.initializers:
            kind = ir.TensorType(tensor.dtype)
            graph.initializers[name] = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)
        return graph.initializers[name]


def _upstream(graph: ir.Graph, outputs: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that ``outputs`` need, in order, and what those read that no node makes."""
    nodes, sources, open_values = set(), {}, list(outputs)
    while open_values:
        value = open_values.pop()
        node = value.producer()
        if node is None:
            sources[value] = None
        elif node not in nodes:
            nodes.add(node)
            open_values.extend(value for value in node.inputs if value is not None)
    return [node for node in graph if node in nodes], list(sources)


def _input(described: dict[str, Any]) -> ir.Value:
    kind = ir.TensorType(ir.tensor_adapters.from_torch_dtype(getattr(torch, described["dtype"])))
    return ir.Value(name=described["name"], type=kind, shape=ir.Shape(described["shape"]))
