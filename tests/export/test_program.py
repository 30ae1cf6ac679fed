"""``export_program``: named programs, explicit states, other sizes than those traced."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from gdn_ops.export import export_program
from gdn_ops.export.manifest import describe_program, dimension_names, operators, writes
from gdn_ops.export.parity import Report, compare, module
from gdn_ops.export.program import export_plan, flatten_state, nest_state, plan
from torch.export import Dim

from tests.export import modules


def reload(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def test_user_module_round_trip_at_other_sizes():
    model = modules.Mixer()
    (program,) = export_program(model, modules.mixer_inputs(3, 70), modules.mixer_shapes()).values()
    program = reload(program)
    assert [n for n in operators(program) if n.startswith("gdn::")] == [
        "gdn::causal_conv1d",
        "gdn::chunk_gated_delta_rule",
    ]
    run = program.module()
    for B, T in ((1, 1), (2, 63), (1, 64), (4, 65), (2, 200)):
        inputs = modules.mixer_inputs(B, T, seed=T)
        with torch.no_grad():
            errors = compare(run(*inputs), model(*inputs), ["y", "state", "conv"])
        assert max(errors.values()) < 1e-6, errors


def test_packed_sequences_in_any_number():
    model = modules.Packed()
    program = export_program(model, modules.packed_inputs([0, 9, 9, 40]), modules.packed_shapes())["forward"]
    for bounds in ([0, 5], [0, 1, 2, 3, 3, 80]):
        inputs = modules.packed_inputs(bounds, seed=1)
        errors = compare(program.module()(**inputs), model(**inputs), ["o", "state"])
        assert max(errors.values()) < 1e-6, errors


def test_modes_are_restored():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 4).eval()).train()
    model[1].eval()
    program = export_program(model, (torch.ones(2, 4),))["forward"]
    assert model.training and model[0].training and not model[1].training
    assert torch.equal(program.module()(torch.ones(2, 4)), model[1](torch.ones(2, 4)))


def test_bad_arguments_are_named():
    model = modules.Packed()
    with pytest.raises(ValueError, match=r"example_inputs: expected a tuple.*Packed, got None"):
        export_program(model)
    with pytest.raises(ValueError, match=r"example_inputs: do not fit Packed\.forward"):
        export_program(model, (torch.ones(1),))
    with pytest.raises(TypeError, match="example_inputs: expected a tuple or a dict, got Tensor"):
        export_program(model, torch.ones(1))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        export_program(lambda x: x, (torch.ones(1),))
    with pytest.raises(ValueError, match="model: expected parameters and inputs on one device"):
        export_program(torch.nn.Linear(1, 1), (torch.ones(1, device="meta"),))


def test_state_names():
    state = {"layers": {"0": {"conv": torch.ones(1)}, "1": {"key": torch.ones(2)}}, "position": torch.ones(3)}
    flat = flatten_state(state)
    assert list(flat) == ["layers.0.conv", "layers.1.key", "position"]
    assert nest_state(flat) == state


def hybrid():
    from gdn_ops.models import HybridConfig, HybridLM

    torch.manual_seed(0)
    return HybridLM(HybridConfig.preset("tiny"))


@pytest.fixture(scope="module")
def hybrid_programs():
    model = hybrid()
    return model, {name: reload(program) for name, program in export_program(model).items()}


@torch.no_grad()
def test_hybrid_programs_at_other_sizes(hybrid_programs):
    model, programs = hybrid_programs
    assert list(programs) == ["prefill", "step"]
    prefill, step = (programs[name].module() for name in programs)
    vocabulary = model.config.vocab_size
    for B, T in ((1, 1), (3, 64), (1, 131)):
        ids = torch.randint(vocabulary, (B, T))
        logits, state = prefill(ids, flatten_state(model.init_state(B)))
        eager_logits, eager_state = model.prefill(ids, model.init_state(B))
        names = ["logits", *flatten_state(eager_state)]
        assert list(state) == names[1:]
        errors = compare((logits, state), (eager_logits, flatten_state(eager_state)), names)
        assert max(errors.values()) < 1e-5, errors
        token = torch.randint(vocabulary, (B,))
        logits, state = step(token, state)
        eager_logits, eager_state = model.step(token, eager_state)
        errors = compare((logits, state), (eager_logits, flatten_state(eager_state)), names)
        assert max(errors.values()) < 1e-5, errors


def test_hybrid_programs_name_their_inputs(hybrid_programs):
    model, programs = hybrid_programs
    inputs = programs["prefill"].graph_signature.user_inputs
    assert inputs[0] == "input_ids"
    states = ["state_" + name.replace(".", "_") for name in flatten_state(model.init_state(1))]
    assert list(inputs[1:]) == states


def test_hybrid_refuses_example_inputs():
    with pytest.raises(ValueError, match="expected None for a HybridLM"):
        export_program(hybrid(), example_inputs=(torch.ones(1, 1, dtype=torch.long),))


def test_examples_are_contiguous_as_a_packages_inputs_are():
    """Inductor compiles for the strides that it is shown: an example that is a view would spoil the package."""
    strided = torch.arange(6.0).view(3, 2).mT
    (example,) = plan(torch.nn.Identity(), (strided,))["forward"].args
    assert example.is_contiguous() and torch.equal(example, strided)
    for item in plan(hybrid()).values():
        assert all(x.is_contiguous() for x in (item.args[0], *item.args[1].values()))


def test_names_are_the_tensors_own_in_whatever_order_they_are_given():
    inputs = modules.rule_inputs(2, 70)
    shapes = {name: {0: Dim("batch", min=1), 1: Dim("T", min=1)} for name in inputs}
    for order in (list(inputs), list(reversed(inputs)), ["beta", "q", "g", "v", "k"]):
        item = plan(modules.Rule(), {name: inputs[name] for name in order}, shapes)["forward"]
        described = describe_program(item, export_plan(item))["inputs"]
        assert {x["name"]: x["shape"][2:] for x in described} == {n: list(x.shape[2:]) for n, x in inputs.items()}
        assert all(x["shape"][:2] == ["batch", "T"] for x in described)


class Tokens(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


torch.export.register_dataclass(Pair)


class Called(torch.nn.Module):
    """A module around a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function


class OfOne(Called):
    def forward(self, pair):
        return self.function(pair)


class OfTwo(Called):
    def forward(self, pair, z):
        return self.function(pair), z * 2


class OfAny(Called):
    def forward(self, *xs):
        return self.function(xs)


A, N = Dim("a", min=1), Dim("n", min=1, max=500)
X, Y = torch.ones(6, 3), torch.ones(8, 3)
NAMED = {
    "tuple": (
        OfTwo(lambda p: p[0] + 1), ((X, Y), Y), {"pair": ({0: A}, {0: N}), "z": {0: N}},
        [["a", 3], ["n", 3], ["n", 3]],
    ),
    "dict": (
        OfTwo(lambda p: p["x"] + 1), ({"x": X, "y": Y.clone()}, Y), {"pair": {"x": {0: A}, "y": None}, "z": {0: N}},
        [["a", 3], [8, 3], ["n", 3]],
    ),
    "named tuple": (OfOne(lambda p: p.x + 1), (Tokens(X, Y),), {"pair": Tokens({0: A}, {0: N})}, [["a", 3], ["n", 3]]),
    "dataclass": (OfOne(lambda p: p.x + 1), (Pair(X, Y),), {"pair": [{0: A}, {0: N}]}, [["a", 3], ["n", 3]]),
    "any number": (OfAny(lambda xs: xs[1] + 1), (X, Y), {"xs": ({0: A}, {0: N})}, [["a", 3], ["n", 3]]),
    "a multiple": (OfOne(lambda p: p[0].unflatten(0, (-1, 2))), ((X,),), {"pair": ({0: 2 * N},)}, [["2*n", 3]]),
    "left to torch": (OfTwo(lambda p: p + 1), (X, Y), ({0: Dim.AUTO}, {0: Dim("d0")}), [["d1", 3], ["d0", 3]]),
    "the other way": (OfTwo(lambda p: p + 1), (X, Y), ({0: Dim("d1")}, {0: Dim.DYNAMIC}), [["d1", 3], ["d2", 3]]),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_sizes_have_their_names_however_inputs_nest(case):
    model, inputs, shapes, want = NAMED[case]
    item = plan(model, inputs, shapes)["forward"]
    program = export_plan(item)
    entry = describe_program(item, program)
    assert [x["shape"] for x in entry["inputs"]] == want
    assert entry["dynamic"].keys() == {x for shape in want for x in map(str, shape) if not x.isdigit()} - {"2*n"} | (
        {"n"} if case == "a multiple" else set()
    )
    report = Report(torch.float32)
    names = [x["name"] for x in entry["outputs"]]
    module(report, item, program, program.module(), dimension_names(item, program), names)
    report.check()
    assert len(report.cases) > 3


def test_what_is_no_tensor_and_what_is_written_is_told():
    item = plan(modules.Scaled(), (X, 0.5, None, Y))["forward"]
    entry = describe_program(item, export_plan(item))
    assert entry["constants"] == {"scale": 0.5, "mask": None} and entry["writes"] == []
    assert entry["parameters"] == ["x", "scale", "mask", "y"]
    model, state = modules.Counting(), torch.zeros(2, 3)
    item = plan(model, (X, state))["forward"]
    program = export_plan(item)
    assert writes(item, program) == {"calls": "buffer", "state": "input"}  # x is written nowhere
    assert describe_program(item, program)["writes"] == ["state"]
    assert not state.any() and not model.calls.any()
