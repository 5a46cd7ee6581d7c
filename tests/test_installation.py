"""What an installation needs: the kernels torch alone, the trainer its extra; and what texts say of it."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import r2m
import r2m_kernels
from r2m_kernels import build, extension

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "examples", "benchmarks", "r2m", "r2m_kernels")
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "setup.py")]
TEXTS += [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*")) if path.suffix in (".md", ".py")]
# Imported by r2m as well; they come with torch, transformers or pydantic.
BROUGHT = {"jinja2", "packaging", "pydantic_core", "tokenizers"}

# The README's kernels; every module of r2m_kernels that needs neither a compiler nor Triton.
KERNELS = """
import torch
from r2m_kernels import build, grebt_loss, policy_feedback_reward, time_weight, SequenceToTokenAttention, RewardHead
attention, head = SequenceToTokenAttention(6, 8, 4), RewardHead(6)
rewards = policy_feedback_reward(
    torch.randn(4, 6), torch.randn(4, 5, 8), *attention.parameters(), *head.parameters(), weight=time_weight(1, 2, 0.6)
)
grebt_loss(rewards.view(2, 2), alpha=0.3, eps=1e-2).backward()
assert all(p.grad is not None for p in attention.parameters())
"""


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def with_torch_alone(code: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs code where all that can be imported is the standard library, torch with what it requires, and `path`."""
    brought, waiting = set(), ["torch"]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in brought:
            brought.add(name)
            wanted = map(Requirement, metadata.requires(name) or ())
            waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    hidden = [
        package
        for package, owners in metadata.packages_distributions().items()
        if not brought & {owner.lower().replace("_", "-") for owner in owners}
        and package not in ("r2m", "r2m_kernels", "triton")  # triton: torch looks for it, whoever brought it
    ]
    code = f"import sys\nsys.path.insert(0, {str(path)!r})\nsys.modules.update(dict.fromkeys({hidden!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)


def test_the_benchmarks_of_kernels_are_there_with_torch_alone():
    done = with_torch_alone("from r2m_kernels.bench.__main__ import main")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_kernels_run_with_torch_alone():
    done = with_torch_alone(KERNELS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import r2m", "from r2m.cli import app"])  # the second is the console script's
def test_the_trainer_without_its_extra_says_what_to_install(code):
    done = with_torch_alone(code)
    expected = (
        r"ImportError: r2m needs accelerate, .*transformers, typer, yaml: pip install 'r2m-kernels\[train\]' "
        r"\(r2m_kernels needs torch alone\)"
    )
    assert done.returncode == 1 and re.fullmatch(expected, done.stderr.splitlines()[-1]), done.stderr
    assert "During handling" not in done.stderr


def test_an_older_transformers_is_not_enough(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('import torch\n\n__version__ = "4.57.1"\n')
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import r2m"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "r2m needs transformers 5 or newer (this is 4.57.1): pip install 'r2m-kernels[train]'"
    assert done.returncode == 1 and expected in done.stderr.splitlines()[-1]


def test_the_only_dependency_is_torch_and_the_extras_bring_the_trainer(project):
    extras = project["optional-dependencies"]
    assert [Requirement(one).name for one in project["dependencies"]] == ["torch"]
    imported = {{"PyYAML": "yaml"}.get(name, name) for name in (Requirement(one).name for one in extras["train"])}
    assert sorted(imported) == list(r2m._TRAIN)

    def brings(extra: str) -> set[str]:
        own = [Requirement(one) for one in extras[extra]]
        inner = {name for one in own if one.name == project["name"] for name in one.extras}
        return {extra}.union(*map(brings, inner))

    assert all("train" in brings(extra) for extra in ("demo", "data", "label", "trl", "dev"))
    assert not any("train" in brings(extra) for extra in ("build", "triton"))


def imports(tree: ast.AST) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)


def test_imports_are_what_the_extras_bring(project):
    extras = project["optional-dependencies"]
    of_verl = {"ray", "omegaconf", "tensordict", "transfer_queue"}
    optional = {"sklearn", "flash_attn", "pyarrow", *of_verl} | {
        Requirement(one).name for extra in extras.values() for one in extra
    }
    for path in (ROOT / "r2m_kernels").rglob("*.py"):
        benched = {"matplotlib", "flash_attn"} if path.parent.name == "bench" else set()  # a figure, and a provider
        assert imports(ast.parse(path.read_text())) <= {"torch", "triton", "r2m_kernels", *benched}, path
    for path in (ROOT / "r2m").rglob("*.py"):
        wherever = imports(ast.parse(path.read_text()))
        assert wherever <= {"torch", "r2m", "r2m_kernels", *r2m._TRAIN, *BROUGHT, *optional}, path


def test_a_wheel_carries_every_file_of_the_packages():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, patterns in carried.items():
        found = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
        files = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        built = ROOT / "r2m_kernels" / "lib"  # on this machine
        assert {path for path in files - found if path.suffix != ".py" and built not in path.parents} == set()


def test_every_extra_that_a_text_names_exists(project):
    extras = project["optional-dependencies"]
    named = 0
    for path in TEXTS:
        for install in re.findall(r"'((?:\.|[\w-]+)\[[\w,]+\])'", path.read_text()):
            name, inside = install.rstrip("]").split("[")
            assert name in (".", project["name"]) and set(inside.split(",")) <= set(extras), f"{path}: {install}"
            named += 1
    assert named > 8


def test_one_version(project):
    assert r2m.__version__ == r2m_kernels.__version__
    assert project["dynamic"] == ["version"] and "version" not in project


def test_texts_agree_on_the_oldest_torch(project):
    kernels = (ROOT / "docs" / "kernels.md").read_text()
    (oldest,) = project["dependencies"]
    extension_needs = "torch " + ".".join(map(str, extension.OLDEST_TORCH))
    assert f'(`impl="torch"`) | {oldest.replace(">=", " ")} |' in kernels
    assert f"its compiled extension | {extension_needs}," in kernels
    assert f"Needs {extension_needs} or" in build.__doc__


def test_texts_agree_on_nvcc_and_on_the_time_of_the_benchmarks():
    kernels, benchmarks = ((ROOT / "docs" / name).read_text() for name in ("kernels.md", "benchmarks.md"))
    versions = {re.search(r"nvcc (\d+(?:\.\d+)?) or newer", text)[1] for text in (kernels, build.__doc__)}
    assert len(versions) == 1
    (line,) = re.findall(r"^make bench\b.*; (.*) on two CPU cores$", benchmarks, re.MULTILINE)
    assert re.search(rf"^bench:.*\({line} on two CPU cores\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
