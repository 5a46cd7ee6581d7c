"""Every script in examples/ runs as it is, and prints what it claims."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *options):
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *options], check=True, capture_output=True, text=True, timeout=120
    ).stdout


# movie_reviews.py takes data from the net: tests/test_training_guide.py gives it others.
@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - {"movie_reviews.py"}))
def test_runs_with_its_defaults(name):
    assert run(name).strip()


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ("", 44),
        ("--ragged", None),
        ("--prompt-tokens 512 --response-tokens 512 --responses 8 --prompts 1 --width 32", 44),
        ("--prompt-tokens 400 --response-tokens 50 --responses 4 --prompts 2 --width 32", 67),
    ],
)
def test_prefix_sharing_gives_the_plain_form_for_fewer_bytes(options, saved):
    output = run("prefix_sharing.py", *options.split())
    assert float(re.search(r"largest relative difference .*: (\S+)", output)[1]) < 1e-5
    read, plain, share = (int(n.replace(",", "")) for n in re.search(r"(\S+) bytes .* (\S+), (\d+)%", output).groups())
    assert share == round(100 * (1 - read / plain))
    assert saved is None or share == saved
    assert re.search(r"GREBT \d\.\d+, largest gradient of W_q [1-9]", output)
