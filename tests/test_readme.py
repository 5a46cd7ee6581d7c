"""What README and CONTRIBUTING show has to run, and to be so."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import r2m
import r2m_kernels
from r2m.config import config_from_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_kernel_example_runs_and_trains_every_weight():
    names: dict = {}
    (example,) = (block for block in blocks("python") if "from r2m_kernels import" in block)
    exec(example, names)
    # Not the head's bias: GREBT does not see a shift of all rewards.
    weights = [*names["reward"].attention.parameters(), names["reward"].head.weight]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_the_config_example_has_known_keys_only():
    (text,) = blocks("yaml")
    config = config_from_dict(yaml.safe_load(text))
    assert config.r2m.feedback == "trained"


def test_every_public_operator_is_listed():
    assert all(f"`{name}`" in README for name in r2m_kernels.__all__ if name != "available_implementations")


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/trl.md"])
def test_names_imported_in_the_examples_exist(page):
    lines = re.findall(r"^from r2m import (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        assert all(hasattr(r2m, name.strip()) for name in line.split(","))


# ---- CONTRIBUTING.md, Layout ----


def drawing() -> str:
    return re.search(r"^## Layout\n.*?^```\n(.*?)^```", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1]


def places() -> dict[str, int]:
    """Of r2m's rooms and files, from the top down; those below the line, which serve all, have one place."""
    ordered, _, below = drawing().partition("\nr2m_kernels/")[0].partition("\n  ---\n")
    names, serving = (re.findall(r"^  (\w+)(?:/|\.py) ", part, re.MULTILINE) for part in (ordered, below))
    return {name: place for place, name in enumerate(names)} | dict.fromkeys(serving, len(names))


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports from) of r2m."""
    home, found = Path(r2m.__file__).parent, set()
    for path in home.rglob("*.py"):
        room = path.relative_to(home).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"r2m.{alias.name}" for alias in node.names] if node.module == "r2m" else [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(room, name.split(".")[1]) for name in names if name.startswith("r2m.")}
    return {(room, other) for room, other in found if room != other and room != "__init__"}


# Imports against the order, of which there may be fewer, never more.
UPWARDS = {
    ("trainer", "commands"),
    ("runs", "trainer"),
    ("policy", "trainer"),
    ("config", "runs"),
    ("config", "data"),
}


def test_the_layout_names_every_module_and_room():
    of_r2m, _, of_kernels = drawing().partition("\nr2m_kernels/")
    for package, text in ((r2m, of_r2m + of_kernels), (r2m_kernels, of_kernels)):
        home = Path(package.__file__).parent
        modules = [path.name for path in home.glob("*.py") if path.name != "__init__.py"]
        folders = [f"{path.parent.name}/" for path in home.glob("*/__init__.py")]
        assert modules and folders
        assert [name for name in modules + folders if name not in text] == []


def test_rooms_import_from_those_below():
    place = places()
    assert place["cli"] == 0 and place["data"] + 1 == place["config"] == place["presets"]
    known = {(room, other) for room, other in arrows() if room in place and other in place}
    assert {(room, other) for room, other in known if place[room] > place[other]} <= UPWARDS
