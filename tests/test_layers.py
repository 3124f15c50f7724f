"""Imports go one way, and xDSL stays where graphs are made and read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sagellm"

LAYERS = [
    {
        "errors",
        "checks",
        "documents",
        "batch",
        "rows",
        "trees",
        "drafts",
        "random",
        "schemas",
        "target",
        "topology",
        "ports",
        "host",
        "grammar",
        "config",
        "kv",
        "__init__",
    },
    {"ir"},
    {"models", "passes"},
    {"backends"},
    {"compiler", "runtime", "meaning"},
    {"engine"},
    {"bench", "conformance", "server"},
    {"control_plane"},
    {"cli", "testing", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
XDSL = {
    "ir",
    "passes",
    "testing",
    "meaning",
    "models/decoder.py",
    "backends/emit.py",
    "backends/step.py",
    "engine/explain.py",
}
# The registry of passes and the registry of backends are tables of strings that any layer may look up.
TYPING_ONLY = "TYPE_CHECKING"

FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules imported at the top or inside functions; not those for type checkers alone."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and TYPING_ONLY in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "sagellm" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only(path):
    own = path.parts[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("sagellm."):
            continue
        other = module.split(".")[1]
        if other == own or other.startswith("__"):
            continue
        siblings = LEVEL[other] == LEVEL[own] and own in LAYERS[0] | LAYERS[-1]
        assert LEVEL[other] < LEVEL[own] or siblings, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_xdsl_is_imported_where_graphs_are(path):
    text = path.as_posix()
    allowed = path.parts[0] in XDSL or text in XDSL or text.endswith("/codegen.py")
    assert allowed or not any(module.split(".")[0] == "xdsl" for module in imports(path)), path


@pytest.mark.parametrize("path", FILES, ids=str)
def test_leaves_know_neither_torch_nor_transformers(path):
    modules = {module.split(".")[0] for module in imports(path)}
    assert "transformers" not in modules and "pickle" not in modules
    if path.parts[0].removesuffix(".py") in LAYERS[0]:
        assert "torch" not in modules
