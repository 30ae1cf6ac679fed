"""An ONNX language model made by hand, with an export's files around it, whose text can be foretold.

Two states: ``layers.0.total [batch]``, the sum of all tokens so far, and ``position [batch]``, their number. The next
token is their sum modulo VOCABULARY, so a state that is lost, or written over while it is read, changes the text.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from onnx import TensorProto, helper, save

VOCABULARY, START = 256, 7


def foretold(prompt: list[int], count: int, end: int | None = None) -> list[int]:
    """The tokens that continue ``prompt``, up to ``end``."""
    total, position, tokens = START + sum(prompt), len(prompt), []
    while len(tokens) < count and (token := (total + position) % VOCABULARY) != end:
        tokens.append(token)
        total, position = total + token, position + 1
    return tokens


def write(folder: Path, dtype: int = TensorProto.FLOAT, text: dict | None = None) -> Path:
    """The model with logits and the state ``total`` in ``dtype`` (1 at the next token, 0 elsewhere); its file."""

    def value(name: str, kind: int, shape: list) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    def constant(name: str, values: list[int]) -> object:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    nodes = [
        helper.make_node("Cast", ["layers.0.total"], ["before"], to=TensorProto.INT64),
        helper.make_node("Shape", ["input_ids"], ["T"], start=1, end=2),
        helper.make_node("CumSum", ["input_ids", "one"], ["inside"]),
        helper.make_node("Unsqueeze", ["before", "one"], ["before_column"]),
        helper.make_node("Add", ["inside", "before_column"], ["totals"]),
        helper.make_node("ConstantOfShape", ["T"], ["ones_flat"], value=constant("", [1])),
        helper.make_node("CumSum", ["ones_flat", "zero"], ["count"]),
        helper.make_node("Unsqueeze", ["position", "one"], ["position_column"]),
        helper.make_node("Add", ["count", "position_column"], ["positions"]),
        helper.make_node("Add", ["totals", "positions"], ["sums"]),
        helper.make_node("Mod", ["sums", "depth"], ["next"]),
        helper.make_node("OneHot", ["next", "depth", "off_on"], ["chosen"]),
        helper.make_node("Cast", ["chosen"], ["logits"], to=dtype),
        helper.make_node("ReduceSum", ["input_ids", "one"], ["added"], keepdims=0),
        helper.make_node("Add", ["before", "added"], ["after"]),
        helper.make_node("Cast", ["after"], ["layers.0.total.new"], to=dtype),
        helper.make_node("Add", ["position", "T"], ["position.new"]),
    ]
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "T"]), value("layers.0.total", dtype, ["batch"])]
    outputs = [value("logits", dtype, ["batch", "T", VOCABULARY]), value("layers.0.total.new", dtype, ["batch"])]
    inputs.append(value("position", TensorProto.INT64, ["batch"]))
    outputs.append(value("position.new", TensorProto.INT64, ["batch"]))
    constants = {"zero": [0], "one": [1], "depth": [VOCABULARY], "off_on": [0, 1]}
    fixed = [constant(name, values) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, fixed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    states = {"layers.0.total": "layers.0.total.new", "position": "position.new"}
    manifest = {
        "format": "gdn_ops.onnx",
        "format_version": 1,
        "target": "portable",
        "config": {"vocab_size": VOCABULARY},
        "initial_state": {"layers.0.total": START, "position": 0},
        "programs": {
            "prefill": {
                "file": path.name,
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "states": states,
            }
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = text or {"tokenizer": "bytes", "vocab_size": VOCABULARY, "end_of_text": 0}
    (folder / "text.json").write_text(json.dumps({"format": "gdn_ops.text", "version": 1, **text}))
    return path
