"""The design, as far as it can be tested: who may import what, and how long things may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "onnxcomp"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420
MAX_FUNCTION_LINES = 60

# Third-party modules that only some files may import; everything else is free.
ONLY_IN = {
    "onnx_graphsurgeon": {"draft.py"},
    "onnxruntime": {"runtime.py", "sandbox_child.py", "kit_script.py"},
    "torch": {"bridge/"},
    "numba": {"codec/"},
    "typer": {"cli/"},
    "rich": {"cli/", "report/"},
}
# Layers, lowest first; a file imports its own layer and lower ones at module level.
LAYERS = [
    {"errors", "kit_script"},
    {
        "json_fields",
        "numerics",
        "sample_files",
        "sample_rules",
        "samples",
        "augmentation",
        "model",
        "outline",
        "draft",
        "deadline",
        "parallel",
        "loading",
    },
    {"runtime", "sandbox", "sandbox_child", "drift", "metrics"},
    {
        "analysis",
        "evaluate",
        "bench",
        "opening",
        "calibration_chains",
        "kit",
        "calibration",
        "codec",
    },
    {"passes", "validation"},
    {"bridge"},
    {"search", "report", "recipe", "teaching", "tune"},
    {"cli", "__main__"},
]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """All modules that a file imports at run time."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    guarded = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node in guarded or (top_level_only and node in inner):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def layer(module: str) -> int:
    parts = module.split(".")
    if len(parts) == 1:
        return len(LAYERS)
    return next(i for i, names in enumerate(LAYERS) if parts[1] in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_imports(path):
    used = {module.split(".")[0] for module in imports(path)}
    for module, allowed in ONLY_IN.items():
        if module in used:
            assert any(name_of(path).startswith(place) for place in allowed), (
                f"{name_of(path)} imports {module}, which only {sorted(allowed)} may"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers(path):
    if path == PACKAGE / "__init__.py":
        return
    own = layer("onnxcomp." + name_of(path).removesuffix(".py").replace("/", "."))
    for module in imports(path, top_level_only=True):
        if module.startswith("onnxcomp."):
            assert layer(module) <= own, f"{name_of(path)} reaches up to {module}"


def test_numerics_knows_no_graph():
    allowed = {"onnxcomp.errors", "onnxcomp.numerics"}
    for path in (PACKAGE / "numerics").glob("*.py"):
        for module in imports(path):
            if module.startswith("onnxcomp"):
                assert any(module.startswith(prefix) for prefix in allowed), (path, module)
            assert module.split(".")[0] not in ("onnx", "onnxruntime", "torch")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{name_of(path)} has {len(lines)} lines"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{name_of(path)}: {node.name} has {length} lines"
            )


def test_printing_only_in_the_command_line():
    for path in FILES:
        if name_of(path).startswith(("cli/", "sandbox_child.py", "kit_script.py")):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), (
            f"{name_of(path)} prints"
        )


def test_checks_bite(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("import torch\nfrom onnxcomp.cli import main\n")
    assert imports(file) == {"torch", "onnxcomp.cli"}
    assert layer("onnxcomp.cli") > layer("onnxcomp.model")


def test_public_names():
    import onnxcomp

    assert list(onnxcomp.__all__) == sorted(onnxcomp.__all__)
    assert all(hasattr(onnxcomp, name) for name in onnxcomp.__all__)
