"""What the README shows has to run, and to be so."""

import re
from pathlib import Path

import pytest
import yaml

import r2m
import r2m_kernels
from r2m.config import config_from_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
