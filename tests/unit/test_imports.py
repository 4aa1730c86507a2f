"""The folders stand in call order and imports only point down."""

from __future__ import annotations

import ast
from pathlib import Path

import lowbit_server

ROOT = Path(lowbit_server.__file__).parent
PACKAGE = "lowbit_server"

# From the top. A module belongs to the longest of these names that it begins with, so
# `quant.schemes`, `quant.quality` and `jobs.spec`, the records that cross process
# boundaries, are not of the layers of their folders: they import nothing but each other
# and errors.
LAYERS = (
    ("__main__",),
    ("cli", "testing"),
    ("server",),
    ("rpc",),
    ("scheduler",),
    ("pool",),
    ("worker",),
    ("engine",),
    ("jobs",),
    ("models",),
    ("quant",),
    ("kernels",),
    ("grammar",),
    ("tokenizer",),
    ("store",),
    ("jobs.spec",),
    ("quant.schemes", "quant.quality"),
    ("collector", "config", "errors", "hardware", "logs", "signals"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def layer_of(module: str) -> str:
    """Return the layer of a module, named without the package."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        if (name := ".".join(parts[:size])) in RANKS:
            return name
    raise AssertionError(f"{module} is in no layer: give it a place in LAYERS")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> list[tuple[int, str]]:
    """Return line and name of everything of the package that a file imports, for types too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                # `from package.folder import module` names a module as well.
                found += [(node.lineno, f"{module}.{one.name}") for one in names]
            case ast.Import(names=names):
                found += [(node.lineno, one.name) for one in names]
    return [
        (line, name.removeprefix(f"{PACKAGE}."))
        for line, name in found
        if name.startswith(f"{PACKAGE}.")
    ]


def test_imports_only_point_down() -> None:
    files = sorted(ROOT.rglob("*.py"))
    wrong = []
    checked = 0
    for path in files:
        if path == ROOT / "__init__.py":
            continue
        source = layer_of(module_of(path))
        for line, name in imported(path):
            checked += 1
            target = layer_of(name)
            if target != source and RANKS[target] <= RANKS[source]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {source} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert checked > 100


def test_the_front_imports_no_torch() -> None:
    heavy = {"torch", "transformers", "bitsandbytes", "accelerate", "gguf"}
    above = RANKS["pool"]
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "__init__.py" or RANKS[layer_of(module_of(path))] > above:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not heavy & {name.split(".")[0] for name in names}, path
