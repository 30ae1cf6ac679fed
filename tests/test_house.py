"""The plan of the house holds: floors, import names, a light ``import gdn_ops``, files of one reading."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gdn_ops": "gdn_ops", "lowering": "gdn_ops.lowering", "export": "gdn_ops.export"}
FLOORS = {
    "gdn_ops.reference": 0,
    "gdn_ops.files": 0,
    "gdn_ops.kernels": 1,
    "gdn_ops.ops": 2,
    "gdn_ops.validation": 3,
    "gdn_ops.functional": 3.1,
    "gdn_ops": 3.2,
    "gdn_ops.nn": 4,
    "gdn_ops.models": 4.1,
    "gdn_ops.lowering": 5,
    "gdn_ops.export": 6,
    "gdn_ops.cli": 7,
    "gdn_ops.integrations": 7.1,
}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OURS = sorted(path for folder in (*FOLDERS, "tests", "perf") for path in (ROOT / folder).rglob("*.py"))
identify = {"ids": lambda path: str(path.relative_to(ROOT))}


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS.get(folder, folder), *(part for part in rest if part != "__init__")])


def room(module: str) -> str:
    """The longest key of FLOORS that ``module`` lies in."""
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in FLOORS)


def imports(path: Path) -> set[str]:
    """Every module that the file imports, at any depth; ``from a import b`` counts as ``a.b`` if b is a module."""
    found = set()
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner in FLOORS or inner in MODULES else origin)
    return found


MODULES = {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, **identify)
def test_imports_come_from_floors_below(path):
    here = room(module_name(path))
    for name in imports(path):
        if name.split(".")[0] == "gdn_ops":
            there = room(name)
            assert there == here or FLOORS[there] < FLOORS[here], f"{module_name(path)} imports {name} from above"


def test_every_package_has_a_floor():
    packages = {".".join(name.split(".")[:2]) for name in MODULES}
    assert packages <= set(FLOORS)


@pytest.mark.parametrize("path", OURS, **identify)
def test_no_bare_lowering_or_export(path):
    """A second copy under another name would register everything twice."""
    assert not {name.split(".")[0] for name in imports(path)} & {"lowering", "export"}


@pytest.mark.parametrize("path", [p for p in FILES if "kernels" not in p.parts], **identify)
def test_a_file_fits_in_one_reading(path):
    assert len(path.read_text().splitlines()) <= 450


def test_no_drawers_for_odds_and_ends():
    odd = {"utils", "helpers", "common", "misc"}
    assert not [path for path in OURS if odd & {path.stem, *path.relative_to(ROOT).parts}]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    """Beyond what torch itself has loaded: our own floors up to the functions, parts of torch, the standard library."""
    out = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gdn_ops\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    loaded = out.split()
    others = {n.split(".")[0] for n in loaded} - {"gdn_ops", "torch"} - set(sys.stdlib_module_names)
    others = {n for n in others if not n.startswith("_sysconfigdata")}
    assert not others, f"import gdn_ops also loads {sorted(others)}"
    heavy = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.export", "torch.distributed.tensor")
    assert not [n for n in loaded if n.startswith(heavy)]
    ours = [n for n in loaded if n.startswith("gdn_ops")]
    assert not [n for n in ours if FLOORS[room(n)] > FLOORS["gdn_ops"] or n.startswith("gdn_ops.kernels.triton")]


def test_importtime_names_nothing_heavier_than_torch():
    command = [sys.executable, "-X", "importtime", "-c", "import gdn_ops"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    names = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "gdn_ops" in names and "torch" in names
    assert not names & {
        "triton",
        "transformers",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "typer",
        "safetensors",
        "tokenizers",
    }


BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Block())
"""


def test_works_where_triton_cannot_be_imported():
    out = run_python(
        BLOCK_TRITON + "import torch, gdn_ops\n"
        "q = torch.randn(1, 70, 1, 8, requires_grad=True)\n"
        "g = -torch.rand(1, 70, 2)\n"
        "o, _ = gdn_ops.chunk_gated_delta_rule(q, q, torch.randn(1, 70, 2, 4), g, -g, use_qk_l2norm_in_kernel=True)\n"
        "o.sum().backward()\n"
        "y, _ = gdn_ops.causal_conv1d(torch.randn(1, 9, 4), torch.randn(4, 4))\n"
        "print(bool(q.grad.isfinite().all() and y.isfinite().all()), 'triton' in sys.modules)"
    )
    assert out.split() == ["True", "False"]


@pytest.mark.parametrize(
    "order", ["import gdn_ops, torch.utils.flop_counter", "import torch.utils.flop_counter, gdn_ops"]
)
def test_flops_are_counted_in_either_order_of_import(order):
    out = run_python(
        f"{order}\nimport torch\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    gdn_ops.causal_conv1d(torch.randn(1, 5, 3), torch.randn(3, 4))\n"
        "print(counter.get_total_flops())"
    )
    assert out.split() == ["120"]


def test_the_package_says_which_version_it_is():
    import gdn_ops

    assert f'version = "{gdn_ops.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_wheel_holds_every_package_and_nothing_else():
    """The list in pyproject.toml names each package of FOLDERS; what is no .py file is there by a pattern."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text[text.index("packages = [") :].removeprefix("packages = ").split("]")[0] + "]")
    assert sorted(listed) == sorted(module_name(path) for path in FILES if path.name == "__init__.py")
    data = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    data = {name for name in data if not name.endswith((".py", ".pyc"))}
    assert data == {"py.typed", "cpu_kernels.cpp", "cpu_kernels.h", "cpu_shims.cpp"}
    assert 'gdn_ops = ["py.typed"]' in text and '"gdn_ops.lowering" = ["*.cpp", "*.h"]' in text
    assert 'gdn = "gdn_ops.cli:main"' in text
