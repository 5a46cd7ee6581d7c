"""Runs the operators' tests on the Triton kernels, in Triton's interpreter.

    python tests/offline/interpret.py [--full]

Where record.py knows these sources and packages as passed it runs nothing, without --full: `make interpret-some` has a
test of each kernel.
"""

import argparse
import os
import subprocess
import sys
from importlib.metadata import version

import record

NAME = "interpreter"
# Without what torch.compile sees: the operators around the kernels, which `make unit` compiles.
TESTS = ("tests/kernels", "--impl", "triton", "--ignore", "tests/kernels/test_compile.py")


def run_tests() -> int:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=record.ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the tests, on record or not")
    arguments = parser.parse_args()
    packages = " ".join(f"{name} {version(name)}" for name in ("triton", "torch", "numpy", "hypothesis"))
    tests = record.ROOT / "tests"
    sources = [*(record.ROOT / "r2m_kernels").rglob("*.py"), *(tests / "kernels").glob("*.py"), tests / "conftest.py"]
    found = record.fingerprint(sources, packages)
    if not arguments.full and record.is_judged(NAME, found):
        print("these kernels are on record as having passed in the interpreter; --full runs the tests all the same")
        return 0
    status = run_tests()
    if status == 0:
        record.write(NAME, found)
    return status


if __name__ == "__main__":
    sys.exit(main())
