"""Rooms: who may import whom. A room imports from those below it in ORDER, and from itself without a circle."""

import ast
from pathlib import Path

import pytest

import r2m

PACKAGE = Path(r2m.__file__).parent

# From top to bottom; CONTRIBUTING.md draws the same. The last line is of single files, which import one another.
ORDER = [
    {"cli"},
    {"commands", "demo"},
    {"trainer"},
    {"analysis"},
    {"runs"},
    {"scoring"},
    {"fitting"},
    {"integrations"},
    {"policy"},
    {"method"},
    {"data"},
    {"algorithms", "cards", "config", "devices", "models", "names", "plots", "presets", "processes", "progress"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


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


def test_every_module_is_in_a_room():
    assert {room(name) for name in modules()} == set(LEVEL)


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
