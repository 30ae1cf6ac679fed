"""Text from an ONNX file: what the model says, from ONNX Runtime alone, and what is refused."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn_ops.cli import generate_onnx
from gdn_ops.cli.generate_onnx import Model, Refusal, Sampling, array, choose, probabilities, tokens
from gdn_ops.models import generation

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.cli import counting_model
from tests.cli.counting_model import START, VOCABULARY, foretold

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
# Run by `python -c`: the file given first as a program, where neither torch nor this package can be imported.
ALONE = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "gdn_ops", "onnx", "typer"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    loaded = {name.split(".")[0] for name in sys.modules}
    assert "onnxruntime" in loaded and not loaded & {"torch", "gdn_ops", "onnx", "typer"}, sorted(loaded)
"""


def run(*words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=200, **options)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    return counting_model.write(tmp_path_factory.mktemp("counting"))


def greedy(prompt: str, count: int) -> str:
    """What the counting model says after ``prompt``."""
    said = bytes(foretold(list(prompt.encode()), count, end=0))
    return (prompt.encode() + said).decode("utf-8", "replace") + "\n"


def test_the_file_alone_where_torch_cannot_be_imported(counting, tmp_path):
    """A copy of the file in the export's folder needs nothing else, not even the model's name."""
    folder = tmp_path / "carried"
    shutil.copytree(counting.parent, folder)
    shutil.copyfile(generate_onnx.__file__, folder / "generate.py")
    words = ["--prompt", "gate é ", "--temperature", 0, "--max-new-tokens", 20]
    done = run(sys.executable, "-c", ALONE, folder / "generate.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == greedy("gate é ", 20), done.stderr
    assert re.fullmatch(r"portable on ONNX Runtime: prompt 8 tokens at [\d,]+ tokens/s, 19 more at .*\n", done.stderr)


def test_it_imports_nothing_of_ours():
    source = ast.parse(Path(generate_onnx.__file__).read_text())
    found = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) == {"numpy"}


def test_files_beside_it_hide_no_other_module():
    """A file that is run finds its neighbours first."""
    beside = {path.stem for path in Path(generate_onnx.__file__).parent.glob("*.py")}
    assert not beside & {*sys.stdlib_module_names, "numpy", "onnxruntime", "tokenizers", "flatbuffers", "packaging"}


@pytest.mark.parametrize("of", ["file", "folder"])
def test_gdn_generate_hands_over(counting, of):
    """The command, whose process must be another program by the time it writes."""
    code = "from gdn_ops.cli import main; main()"
    words = ["generate", counting if of == "file" else counting.parent, "--prompt=-x", "--temperature", 0]
    done = run(sys.executable, "-c", code, *words, "--max-new-tokens", 9)
    assert done.returncode == 0 and done.stdout == greedy("-x", 9), done.stderr
    assert done.stderr.startswith("portable on ONNX Runtime: ")


def test_options_are_handed_over_as_they_are(gdn, counting, monkeypatch):
    called = []

    def execv(program, words):
        called.append((program, words))
        raise SystemExit(0)

    monkeypatch.setattr("gdn_ops.cli.generate.os.execv", execv)
    words = ["--prompt", "a b", "--top-k", 5, "--top-p", 0.9, "--seed", 3, "--temperature", 1.5, "--max-new-tokens", 4]
    assert gdn("generate", counting, *words).code == 0
    ((program, (same, file, *given)),) = called
    assert program == same == sys.executable and file == generate_onnx.__file__
    options = vars(generate_onnx._options(given))
    expected = {"prompt": "a b", "top_k": 5, "top_p": 0.9, "seed": 3, "temperature": 1.5, "max_new_tokens": 4}
    assert options == {**expected, "file": counting, "threads": 0}
    defaults = [generate_onnx._options(words) for words in (given[-2:], [str(counting)])]
    assert defaults[0] == defaults[1]
    gdn("generate", counting)
    assert generate_onnx._options(called[1][1][2:]) == defaults[0]


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, BFLOAT16])
def test_states_are_fed_back_and_no_call_writes_to_the_one_before(tmp_path, dtype):
    model = Model(counting_model.write(tmp_path, dtype))
    start = model.init_state(2)
    assert [list(array(x)) for x in start.values()] == [[START, START], [0, 0]]
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits, state = model.run(ids, start)
    assert array(logits).shape == (2, 3, VOCABULARY)
    for row in range(2):
        whole = [foretold(list(ids[row, : t + 1]), 1)[0] for t in range(3)]
        assert list(array(logits)[row].argmax(-1)) == whole
    totals = [array(state["layers.0.total"]).copy()]
    for _ in range(3):
        _, state = model.run(np.array([[1], [2]]), state)
        totals.append(array(state["layers.0.total"]).copy())
    assert np.array_equal(totals, START + np.array([[6, 15], [7, 17], [8, 19], [9, 21]]))
    assert [list(array(x)) for x in start.values()] == [[START, START], [0, 0]]


def test_a_state_is_bound_again_as_it_is(counting, monkeypatch):
    """No copy: what one call puts out is the very value that the next call binds."""
    model = Model(counting)
    _, state = model.run(np.array([[1, 2]]), model.init_state(1))
    bound, session = {}, model.session

    class Watched:
        def io_binding(self):
            binding = session.io_binding()
            original = binding.bind_ortvalue_input

            def bind(name, value):
                bound[name] = value.data_ptr()
                original(name, value)

            binding.bind_ortvalue_input = bind
            return binding

        def run_with_iobinding(self, binding):
            session.run_with_iobinding(binding)

    model.session = Watched()
    _, after = model.run(np.array([[3]]), state)
    for name in ("layers.0.total", "position"):
        assert bound[name] == state[name].data_ptr() != after[name].data_ptr()


def test_the_end_of_text_ends_it_and_so_does_the_limit(counting):
    model, speed = Model(counting), generate_onnx.Speed()
    random = np.random.default_rng(0)
    whole = foretold([1, 2], 6)
    assert list(tokens(model, [1, 2], 6, Sampling(), random, VOCABULARY, None, speed)) == whole
    assert speed.prompt == 2 and speed.steps == 5 and speed.prefill_seconds > 0 < speed.step_seconds
    assert list(tokens(model, [1, 2], 6, Sampling(), random, VOCABULARY, whole[3], speed)) == whole[:3]


SAMPLINGS = [
    Sampling(1.0), Sampling(0.3), Sampling(1.7, top_k=5), Sampling(1.0, top_p=0.6), Sampling(0.8, 40, 0.9),
    Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-9), Sampling(1.0, top_k=999, top_p=1.0),
    Sampling(1e-50), Sampling(1.0, top_p=1e-50), Sampling(1.0, 3, 1e-50),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_chances_are_eagers(sampling, monkeypatch):
    """Among the logits are equal ones, so that ties at the k-th place count, and one that leaves."""
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3
    logits[10:14], logits[20] = logits.topk(5).values[-1], -torch.inf
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: drawn.append(p[0]) or p.argmax(-1, keepdim=True))
    generation.choose(logits[None], generation.Sampling(*sampling))
    chances = probabilities(logits.numpy(), sampling)
    assert np.array_equal(chances > 0, drawn[0].numpy() > 0)
    np.testing.assert_allclose(chances / chances.sum(), drawn[0] / drawn[0].sum(), rtol=2e-5, atol=1e-12)


def test_draws_have_their_chances():
    logits, sampling = np.log(np.array([0.5, 0.0, 0.3, 0.15, 0.05, 0.0]) + 1e-30), Sampling(1.0, top_k=3)
    random = np.random.default_rng(0)
    counts = np.bincount([choose(logits, sampling, random) for _ in range(8000)], minlength=6)
    expected = np.array([0.5, 0, 0.3, 0.15, 0, 0]) / 0.95
    assert np.array_equal(counts > 0, expected > 0) and np.abs(counts / 8000 - expected).max() < 0.02
    assert choose(logits, Sampling(), random) == 0

    class Edge:
        def random(self):
            return self.value

    edge = Edge()
    for edge.value, token in ((0.0, 0), (1 - 2**-53, 3)):  # never one without a chance
        assert choose(logits, sampling, edge) == token


def test_seeds(counting):
    def text(seed: int) -> bytes:
        words = ["--prompt", "a", "--temperature", 50, "--seed", seed, "--max-new-tokens", 30]
        return run(sys.executable, generate_onnx.__file__, counting, *words, "--top-k", 200, errors="replace").stdout

    assert text(1) == text(1) != text(2)


def test_with_a_tokenizer_file(tmp_path, tokenizer_file):
    """Characters of several tokens come out whole."""
    text = {"tokenizer": "tokenizer.json", "vocab_size": VOCABULARY, "end_of_text": 0}
    path = counting_model.write(tmp_path, text=text)
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    ids = tokenizer.encode("state é", add_special_tokens=False).ids
    words = ["--prompt", "state é", "--temperature", 0, "--max-new-tokens", 60]
    done = run(sys.executable, generate_onnx.__file__, path, *words)
    said = tokenizer.decode(ids + foretold(ids, 60, end=0), skip_special_tokens=True)
    assert done.returncode == 0 and done.stdout == said + "\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/no/such/model.onnx"], "FILE: expected an exported model, got /no/such/model.onnx, which does not exist"),
        (["{model}", "--top-k", "3", "--temperature", "0"], "--top-k, --top-p: expected none with --temperature 0"),
        (["{model}", "--top-k", "0"], "--top-k: expected an integer from 1 to 2**63 - 1, got '0'"),
        (["{model}", "--top-p", "1.5"], "--top-p: expected a number above 0 and at most 1, got '1.5'"),
        (["{model}", "--temperature", "nan"], "--temperature: expected a number of at least 0, got 'nan'"),
        (["{model}", "--seed", "x"], "--seed: expected an integer from 0 to 2**63 - 1, got 'x'"),
        (["{model}", "--speed", "9"], "unrecognized arguments: --speed 9 (see --help)"),
    ],
)
def test_refusals(counting, capsysbinary, words, told):
    assert generate_onnx.main([word.replace("{model}", str(counting)) for word in words]) == 2
    out, err = capsysbinary.readouterr()
    assert not out and err.decode().startswith("gdn: ") and told in err.decode() and err.count(b"\n") == 1


def test_the_device_of_an_onnx_file(gdn, counting):
    result = gdn("generate", counting, "--device", "cuda")
    assert result.code == 2 and "--device: expected auto or cpu for" in result.err and "got 'cuda'" in result.err


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, **changes}))


def _edit_program(folder: Path, **changes: object) -> None:
    programs = json.loads((folder / "manifest.json").read_text())["programs"]
    _edit(folder / "manifest.json", programs={"prefill": {**programs["prefill"], **changes}})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "describe an export of a language model, got none (No"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "an export of a language model, got no JSON (Exp"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "language model, got no JSON ("),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "of a language model, with a dict, got []"),
        (lambda folder: _edit(folder / "manifest.json", format_version=2), "with format_version 1, got 2"),
        (lambda folder: _edit(folder / "manifest.json", format="gdn_ops.aoti"), "gdn_ops.tensorrt, got 'gdn_ops.aoti'"),
        (lambda folder: _edit(folder / "manifest.json", config=None), "with config dict, got None"),
        (lambda folder: _edit(folder / "manifest.json", config={}), "with config.vocab_size, got none"),
        (lambda folder: _edit(folder / "manifest.json", config={"vocab_size": "256"}), "vocab_size int, got '256'"),
        (lambda folder: _edit(folder / "manifest.json", programs={}), "with programs.prefill, got none"),
        (lambda folder: _edit(folder / "manifest.json", initial_state={}), "initial_state.layers.0.total, got none"),
        (lambda folder: _edit_program(folder, data=5), "with programs.prefill.data list, got 5"),
        (
            lambda folder: _edit_program(folder, states={}),
            "the inputs input_ids as in its manifest, got input_",
        ),
        (lambda folder: (folder / "model.onnx").write_bytes(b"no"), "bytes as in its manifest, got another file"),
        (lambda folder: _flip(folder / "model.onnx"), "FILE: expected model.onnx of sha256 "),
        (lambda folder: (folder / "text.json").unlink(), "text.json to describe a tokenizer, got none (No such file"),
        (lambda folder: (folder / "text.json").write_text("{}"), "to describe a tokenizer, with format, got none"),
        (lambda folder: _edit(folder / "text.json", version=9), "to describe a tokenizer, with version 1, got 9"),
        (lambda folder: _edit(folder / "text.json", tokenizer=5), "with tokenizer str, got 5"),
        (lambda folder: _edit(folder / "text.json", vocab_size="256"), "with vocab_size int, got '256'"),
        (lambda folder: _edit(folder / "text.json", tokenizer="tokenizer.json"), "a Hugging Face tokenizer.json, got"),
        (lambda folder: _edit(folder / "text.json", vocab_size=300), "expected a vocabulary of 300 as its tokenizer's"),
        (lambda folder: _edit(folder / "text.json", end_of_text=None), "--prompt: expected some text"),
    ],
)
def test_folders_that_are_not_whole(counting, tmp_path, capsysbinary, damage, told):
    folder = tmp_path / "copy"
    shutil.copytree(counting.parent, folder)
    damage(folder)
    assert generate_onnx.main([str(folder / "model.onnx")]) == 2
    out, err = capsysbinary.readouterr()
    assert not out and told in err.decode() and err.count(b"\n") == 1


def test_a_file_that_the_runtime_cannot_load(tmp_path):
    path = counting_model.write(tmp_path)
    path.write_bytes(b"no")
    fields = json.loads((tmp_path / "manifest.json").read_text())
    fields["programs"]["prefill"] |= {"size": 2, "sha256": hashlib.sha256(b"no").hexdigest()}
    _edit(tmp_path / "manifest.json", **fields)
    with pytest.raises(Refusal, match="FILE: expected a model that ONNX Runtime loads, got "):
        Model(path)


def test_a_library_that_is_missing(counting, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Refusal, match="an ONNX file needs onnxruntime: pip install onnxruntime"):
        Model(counting)


def test_a_reader_that_leaves_early(tmp_path):
    path = counting_model.write(tmp_path, text={"tokenizer": "bytes", "vocab_size": VOCABULARY, "end_of_text": None})
    words = [sys.executable, generate_onnx.__file__, str(path), "--prompt", "a", "--max-new-tokens", "1000000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=200) == 1 and err == b""
