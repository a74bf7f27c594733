"""Arrows between packages go down only: the layout of the house, kept by CI."""

import ast
from pathlib import Path

import pytest

import lowbit

SOURCE = Path(lowbit.__file__).parent
# each package may import from its own row's set; what is not listed may import anything in the rows below
LAYERS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"api"},
    {"pipeline", "evals", "runtimes", "recommend", "deploy", "report"},
    {"methods", "transforms", "formats"},
    {"core"},
]
# modules beside the packages: what they are allowed to know
SINGLE = {"recipe": {"core"}, "environments": {"core", "locks"}, "presets": set(), "locks": {"core"}}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(file: Path) -> set[str]:
    """First-level parts of lowbit that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "lowbit" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lowbit.")}
    return found - {"__version__"}


def allowed(part: str) -> set[str]:
    if part in SINGLE:
        return SINGLE[part] | {part}
    below = {name for name, level in LEVEL.items() if level > LEVEL[part]}
    return below | {part} | (set(SINGLE) if LEVEL[part] < LEVEL["core"] else set())


FILES = sorted(file for file in SOURCE.rglob("*.py") if file.name != "__init__.py" or file.parent != SOURCE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_arrows_go_down(file: Path) -> None:
    part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert imports_of(file) <= allowed(part), f"{part} must not import {imports_of(file) - allowed(part)}"


def test_every_package_has_a_layer() -> None:
    parts = {
        path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.name not in ("__init__.py", "__pycache__")
    }
    assert {part for part in parts if not part.startswith((".", "py.typed"))} <= set(LEVEL) | set(SINGLE)


def test_the_check_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from lowbit.pipeline.run import run\nimport lowbit.evals.verify\n")
    assert not imports_of(wrong) <= allowed("methods")
    assert not imports_of(wrong) <= allowed("evals")
