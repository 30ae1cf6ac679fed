"""``load_package`` and ``verify``: inputs are matched by name, and damaged files are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gdn_ops.export import export_aoti, load_package, read_manifest, runner, verify
from torch.export import Dim

from tests.export import modules


@pytest.fixture(scope="module")
def package(language_model):
    return load_package(language_model[1].out_dir)


@pytest.fixture
def used(package):
    """Tokens and a state whose layers differ."""
    ids = torch.arange(18).view(2, 9)
    return ids[:, 0].contiguous(), package.prefill(ids)[1]


def test_a_state_in_any_order(package, used):
    token, state = used
    logits, after = package.step(token, state)
    for order in (sorted(state), list(reversed(state))):
        again, same = package.step(token, {name: state[name] for name in order})
        assert torch.equal(again, logits) and list(same) == list(after)
        assert all(torch.equal(same[name], after[name]) for name in after)


def test_keywords_in_any_order(package, packed):
    ids, state = torch.arange(10).view(2, 5), package.init_state(2)
    prefill, logits = package.programs["prefill"], package.prefill(ids)[0]
    assert torch.equal(prefill(state=state, input_ids=ids)[0], logits)
    assert torch.equal(prefill(ids, state=state)[0], logits)
    inputs, package = modules.packed_inputs([0, 5, 9]), load_package(packed[1].out_dir)
    for a, b in zip(package.forward(**inputs), package.forward(**dict(reversed(inputs.items())))):
        assert torch.equal(a, b)


def test_inner_keys_in_any_order(mixer):
    package = load_package(mixer[1].out_dir)
    x, gates, state = modules.mixer_inputs(2, 9)
    expected = package.forward(x, gates, state)["y"]
    assert torch.equal(package.forward(x, {"beta": gates["beta"], "g": gates["g"]}, state)["y"], expected)
    with pytest.raises(ValueError, match=r"forward: expected gates\.beta, got gates\.b"):
        package.forward(x, {"g": gates["g"], "b": gates["beta"]}, state)


def test_other_names_are_refused(package, used):
    token, state = used
    first, *others = state
    with pytest.raises(ValueError, match=rf"step: expected state\.{first}, .*state\.position, got state\.x0, "):
        package.step(token, {f"x{i}": value for i, value in enumerate(state.values())})
    with pytest.raises(ValueError, match=rf"step: expected state\.{first}, got none"):
        package.step(token, {name: state[name] for name in others})
    with pytest.raises(ValueError, match=r"step: expected no other inputs, got state\.more"):
        package.step(token, {**state, "more": token})


def test_other_arguments_are_refused(package, used):
    token, state = used
    step = package.programs["step"]
    for args, kwargs, told in (
        ((token,), {}, "missing a required argument: 'state'"),
        ((token, state, state), {}, "too many positional arguments"),
        ((token, state), {"input_ids": token}, "multiple values for argument 'input_ids'"),
        ((token, state), {"ids": token}, "unexpected keyword argument 'ids'"),
    ):
        with pytest.raises(ValueError, match=rf"step: expected arguments \(input_ids, state\), got others: .*{told}"):
            step(*args, **kwargs)


def test_positions_without_a_name(tmp_path):
    """The manifest names tensors only: where another argument lies between them, or several share a name."""

    class Sum(torch.nn.Module):
        def forward(self, *terms):
            return terms[0] * terms[1] - terms[2]

    x, y = torch.randn(3), torch.randn(3)
    export_aoti(Sum(), tmp_path / "out", (x, 2.0, y))
    package = load_package(tmp_path / "out")
    assert torch.equal(package.forward(y, 2.0, x), y * 2 - x)
    with pytest.raises(ValueError, match=r"forward: expected arguments \(input_0, input_1, input_2, /\)"):
        package.forward(y, 2.0, x=x)


def test_sizes_and_kinds_name_the_argument(package, packed):
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        package.init_state(0)
    for batch, kind in (("2", "str"), (True, "bool"), (2.0, "float")):
        with pytest.raises(TypeError, match=f"batch: expected an integer, got {kind}"):
            package.init_state(batch)
    with pytest.raises(TypeError, match="input_ids: expected a tensor, got list"):
        package.prefill([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[batch, T\], got \(\)"):
        package.prefill(torch.tensor(1))
    with pytest.raises(ValueError, match="expected a program 'prefill', got forward"):
        load_package(packed[1].out_dir).init_state(1)


def _edit(path: Path, without: str = "", **changes: object) -> None:
    fields = {**json.loads(path.read_text()), **changes}
    fields.pop(without, None)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda manifest, report: manifest.write_text("[]"), r"a dict in .*manifest\.json, got \[\]"),
        (lambda manifest, report: manifest.write_text("{"), r"JSON in .*manifest\.json, got Expecting"),
        (lambda manifest, report: manifest.write_bytes(b"\xff"), r"JSON in .*manifest\.json, got 'utf-8'"),
        (lambda manifest, report: _edit(manifest, "programs"), r"programs in .*manifest\.json, got none"),
        (lambda manifest, report: _edit(manifest, "device"), r"device in .*manifest\.json, got none"),
        (lambda manifest, report: _edit(manifest, config=None), r"config dict in .*manifest\.json, got None"),
        (lambda manifest, report: _edit(manifest, config={}), r"config\.vocab_size in .*manifest\.json, got none"),
        (lambda manifest, report: _edit(manifest, initial_state={}), r"initial_state\.layers\..* in .*, got none"),
        (lambda manifest, report: _edit(manifest, programs={"step": 5}), r"programs\.step dict in .*, got 5"),
        (lambda manifest, report: _edit(manifest, format_version=2), r"format .* in .*json, got gdn_ops\.aoti 2"),
        (lambda manifest, report: report.unlink(), r"an export with a parity\.json, got "),
        (lambda manifest, report: report.write_text("{}"), r"passed in .*parity\.json, got none"),
        (lambda manifest, report: report.write_text("{"), r"JSON in .*parity\.json, got Expecting"),
        (lambda manifest, report: _edit(report, passed="yes"), r"passed bool in .*parity\.json, got 'yes'"),
        (lambda manifest, report: _edit(report, passed=False), r"expected a passed report, got max_error"),
    ],
)
def test_damaged_descriptions(language_model, tmp_path, damage, told):
    copy = tmp_path / "copy"
    shutil.copytree(language_model[1].out_dir, copy)
    damage(copy / "manifest.json", copy / "parity.json")
    for read in (verify, load_package):
        with pytest.raises(ValueError, match=told):
            read(copy)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for read in (read_manifest, verify, load_package):
        with pytest.raises(ValueError, match=r"out_dir: expected an export with a manifest\.json, got .*file"):
            read(tmp_path / "file")


def test_other_constants_than_the_examples_are_refused(tmp_path):
    x, y = torch.ones(6, 3), torch.ones(2)
    export_aoti(modules.Scaled(), tmp_path / "out", (x, 0.5, None, y))
    package = load_package(tmp_path / "out")
    assert torch.equal(package.forward(x, 0.5, None, y)[0], x * 0.5)
    assert torch.equal(package.forward(x=x, scale=0.5, mask=None, y=y)[0], x * 0.5)
    with pytest.raises(ValueError, match=r"scale: expected 0\.5, as in the example of the export, got 0\.25"):
        package.forward(x, 0.25, None, y)
    with pytest.raises(ValueError, match="mask: expected None, as in the example of the export, got tensor"):
        package.forward(x, 0.5, x, y)


def test_what_is_written_in_place(tmp_path):
    """The caller's tensor, however it lies in memory; the export itself writes neither the example nor the model."""
    model, x, state = modules.Counting(), torch.rand(6, 3), torch.zeros(2, 3)
    export_aoti(model, tmp_path / "out", (x, state))
    assert not state.any() and not model.calls.any()
    package = load_package(tmp_path / "out")
    for call, given in ((1, state), (2, torch.zeros(3, 2).mT)):
        torch.testing.assert_close(package.forward(x, given), 2 * x + call)
        torch.testing.assert_close(given, torch.stack([x.sum(0), torch.zeros(3)]))


def test_a_number_that_is_written_is_refused(tmp_path):
    """torch's packages would count to one."""
    model = modules.Counting()
    model.calls = torch.zeros(1)
    with pytest.raises(ValueError, match="expected several numbers in the buffer calls, which it writes in place, got"):
        export_aoti(model, tmp_path / "out", (torch.rand(6, 3), torch.zeros(2, 3)))


def test_a_multiple_of_a_size(tmp_path):
    inputs = tuple(modules.rule_inputs(2, 70).values())
    shapes = tuple({1: 2 * Dim("n", min=1, max=99)} for _ in inputs)
    export_aoti(modules.Rule(), tmp_path / "out", inputs, shapes)
    package = load_package(tmp_path / "out")
    shorter = [x[:, :12] for x in inputs]
    torch.testing.assert_close(package.forward(*shorter), modules.Rule()(*shorter), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"q: expected shape \[2, '2\*n', 1, 16\], got \(2, 13, 1, 16\)"):
        package.forward(*(x[:, :13] for x in inputs))
    with pytest.raises(
        ValueError, match=r"k: expected shape \[2, '2\*n', 1, 16\] with \{'n': 6\}, got \(2, 14, 1, 16\)"
    ):
        package.forward(shorter[0], *(x[:, :14] for x in inputs[1:]))


def test_the_device_of_a_package(mixer, monkeypatch):
    """One of several GPUs is the loader's to choose; another kind of device is refused."""
    out_dir = mixer[1].out_dir
    assert load_package(out_dir, "cpu:0").device == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected cpu, which the package was exported for, got cuda:1"):
        load_package(out_dir, "cuda:1")
    loads, load = [], torch._inductor.aoti_load_package
    monkeypatch.setattr(runner, "verify", lambda folder: {**read_manifest(folder), "device": "cuda"})
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path, device_index: loads.append(device_index) or load(path)
    )
    package = load_package(out_dir, "cuda:1")
    assert loads == [1] and package.device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="x: expected a tensor on cuda:1, got cpu"):
        package.forward(*modules.mixer_inputs(2, 9))
