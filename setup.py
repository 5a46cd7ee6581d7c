"""Project data is in pyproject.toml; this file builds csrc ahead of time, if R2M_KERNELS_BUILD says so.

    R2M_KERNELS_BUILD=cpu pip install --no-build-isolation .

cpu, or cuda for both: a wheel for this platform, any Python and torch 2.11 or newer. Unset: Python files only, and the
extension is built when the user asks for it, by `python -m r2m_kernels.build`. What is compiled is kept in the user's
cache as well, where a later installation without the variable finds it.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError:  # --no-build-isolation takes what is installed, whatever pyproject.toml requires
    raise SystemExit(
        f"setuptools 77 or newer is needed, and this is {setuptools.__version__} (pip install -U setuptools)"
    ) from None

ROOT = Path(__file__).parent
BACKENDS = {"": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}
WANTED = os.environ.get("R2M_KERNELS_BUILD", "")
if WANTED not in BACKENDS:
    raise SystemExit(f"R2M_KERNELS_BUILD: expected 'cpu', 'cuda' (both) or nothing, got {WANTED!r}")


def build_extension(folder: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        raise SetupError(
            f"R2M_KERNELS_BUILD={WANTED} needs the torch that the extension will run with, and there is none here:"
            " install torch first, then run pip with --no-build-isolation"
        )
    sys.path.insert(0, str(ROOT))
    from r2m_kernels import build, extension

    shutil.rmtree(folder, ignore_errors=True)  # of other sources
    folder.mkdir(parents=True)
    try:
        for library in build.build(BACKENDS[WANTED], folder=extension.cache()).values():
            shutil.copy2(library, folder)
    except build.BuildError as error:
        raise SetupError(str(error)) from error
    except OSError as error:
        raise SetupError(f"{error} (XDG_CACHE_HOME names another folder than {extension.cache()})") from error


class BuildPy(build_py):
    """Copies the packages and, if wanted, adds r2m_kernels/lib; in place for an editable install."""

    def run(self) -> None:
        packages = ROOT if self.editable_mode else Path(self.build_lib)
        if not self.editable_mode:
            shutil.rmtree(packages / "r2m_kernels", ignore_errors=True)  # of an earlier build, which had other files
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", packages / "r2m_kernels" / "csrc")
        if WANTED:
            build_extension(packages / "r2m_kernels" / "lib")


class BdistWheel(bdist_wheel):
    """A wheel with libraries is for one platform but for any Python, whose API they do not use."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """What makes setuptools tag and install it as compiled."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    distclass=PlatformDistribution if WANTED else Distribution,
)
