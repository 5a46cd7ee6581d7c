"""Rooms as CONTRIBUTING.md draws them: one imports from those below it, never from those above, and in no circle."""

import ast
import re
from pathlib import Path

import pytest

import r2m
import r2m_kernels

PACKAGE = Path(r2m.__file__).parent
ROOT = Path(__file__).parents[1]

DRAWING = re.search(
    r"^## Layout\n.*?^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
)[1]
OF_R2M, _, OF_KERNELS = DRAWING.partition("\nr2m_kernels/")
ORDERED, SERVING = (re.findall(r"^  (\w+)(?:/|\.py) ", part, re.MULTILINE) for part in OF_R2M.split("\n  ---\n"))
# From the top down; single files below the line, which serve all, have one place.
LEVEL = {room: level for level, room in enumerate(ORDERED)} | dict.fromkeys(SERVING, len(ORDERED))


def modules() -> dict[str, Path]:
    """Dotted names below r2m; the package's own __init__, a table of public names, is left out."""
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    parts = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in files}
    return {".".join(p for p in names if p != "__init__"): path for path, names in parts.items()}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of r2m that a file imports anywhere, also inside of functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "r2m":
            inside = node.module.removeprefix("r2m").removeprefix(".")
            names = [f"{inside}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in known else inside for name in names} - {""}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("r2m.") for alias in node.names if alias.name.startswith("r2m.")}
    return found


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) for name, path in known.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_drawing_has_every_room():
    assert {room(name) for name in modules()} == set(LEVEL)
    home = Path(r2m_kernels.__file__).parent
    names = [path.name for path in home.glob("*.py") if path.name != "__init__.py"]
    names += [f"{path.parent.name}/" for path in home.glob("*/__init__.py")]
    assert [name for name in names if name not in OF_KERNELS] == []


def test_no_arrow_points_upwards():
    upwards = {
        f"{name} -> {other}"
        for name, others in arrows().items()
        for other in others
        if LEVEL[room(name)] > LEVEL[room(other)]
    }
    assert upwards == set()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, or none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(graph.get(name, ())) if (c := visit(other, [*way, name]))), [])
        done.add(name)
        return found

    return next((c for name in sorted(graph) if (c := visit(name, []))), [])


def test_there_is_no_circle():
    assert circle(arrows()) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda p: p.name)
def test_a_room_says_in_one_sentence_what_is_at_home_there(package):
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert package == PACKAGE or (text and text.endswith(".") and "\n\n" not in text)
