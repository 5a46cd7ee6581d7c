"""What the README shows has to run."""

import re
from pathlib import Path

import yaml

import r2m
import r2m_kernels
from r2m.config import config_from_dict

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_kernel_example_runs_and_trains_every_weight():
    names: dict = {}
    exec(blocks("python")[0], names)
    # Not the head's bias: GREBT does not see a shift of all rewards.
    weights = [*names["reward"].attention.parameters(), names["reward"].head.weight]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_the_config_example_has_known_keys_only():
    (text,) = blocks("yaml")
    config = config_from_dict(yaml.safe_load(text) | {"learning_rate": 1e-6})
    assert config.r2m.feedback == "trained"


def test_every_public_operator_is_listed():
    assert all(f"`{name}`" in README for name in r2m_kernels.__all__ if name != "available_implementations")


def test_the_layout_names_every_module():
    layout = README.partition("## Layout")[2]
    for package in (r2m, r2m_kernels):
        modules = [path.name for path in Path(package.__file__).parent.glob("*.py") if path.name != "__init__.py"]
        assert modules and all(name in layout for name in modules)


def test_names_imported_in_the_examples_exist():
    for line in re.findall(r"^from r2m import (.*)$", README, re.MULTILINE):
        assert all(hasattr(r2m, name.strip()) for name in line.split(","))
