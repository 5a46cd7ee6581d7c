"""Runs the operators' tests on the Triton kernels, in Triton's interpreter.

    python tests/offline/interpret.py [--full]

Where record.py knows these sources and packages as passed it runs nothing, without --full: `make interpret-some` has a
test of each kernel.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import builds
import record

NAME = "interpreter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the tests, on record or not")
    arguments = parser.parse_args()
    packages = " ".join(f"{name} {version(name)}" for name in ("triton", "torch", "numpy", "hypothesis"))
    tests = record.ROOT / "tests"
    sources = [*(record.ROOT / "r2m_kernels").rglob("*.py"), *(tests / "kernels").glob("*.py"), tests / "conftest.py"]
    sources += map(Path, (__file__, builds.__file__))
    found = record.fingerprint(sources, packages)
    if not arguments.full and record.is_judged(NAME, found):
        print("these kernels are on record as having passed in the interpreter; --full runs the tests all the same")
        return
    builds.run_pytest([], builds.NOT_COMPILED, impl="triton", TRITON_INTERPRET="1")  # exits where a test fails
    record.write(NAME, found)


if __name__ == "__main__":
    main()
