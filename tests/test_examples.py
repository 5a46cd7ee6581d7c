"""Every script in examples/ runs as it is, and prints what it claims; so does what of docs/ needs no framework."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from r2m_kernels import time_weight

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"


@cache  # one run of an example for all that is said of its output
def run(name, *options):
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *options], check=True, capture_output=True, text=True, timeout=120
    ).stdout


# movie_reviews.py takes data from the net: tests/test_training_guide.py gives it others. own_loop.py takes a config:
# tests/r2m/runs/test_run.py. trl_rloo.py needs TRL: tests/integrations. verifier.py and llm_judge.py are labellers:
# tests/r2m/preferences.
ELSEWHERE = {"llm_judge.py", "movie_reviews.py", "own_loop.py", "trl_rloo.py", "verifier.py"}


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE))
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


def test_the_plain_loop_gives_autograds_gradients_and_learns():
    output = run("plain_loop.py")
    assert float(re.search(r"difference from autograd: (\S+)", output)[1]) < 1e-5
    rounds = re.findall(r"round +(\d+): w (\S+), GREBT (\S+)", output)
    assert [int(t) for t, *_ in rounds] == list(range(1, len(rounds) + 1))
    assert [float(w) for _, w, _ in rounds] == [
        pytest.approx(time_weight(t, len(rounds), 0.6), abs=1e-3) for t in range(1, len(rounds) + 1)
    ]
    assert float(rounds[-1][2]) < float(rounds[0][2]) - 0.1


def test_rloo_of_ones_own_scores_what_the_policy_computes_and_learns():
    output = run("own_rloo.py")
    assert float(re.search(r"hidden states kept: (\S+)", output)[1]) < 1e-5
    scores = [float(score) for score in re.findall(r"initial reward model's +(\S+),", output)]
    assert scores[-1] > scores[0] + 0.5


def test_a_generator_of_ones_own_gives_the_policys_probabilities():
    ratios = re.findall(r"importance ratio (\S+)", run("own_generator.py"))
    assert len(ratios) == 4 and all(float(ratio) == pytest.approx(1, abs=1e-4) for ratio in ratios)


def test_remote_pooling_gives_the_local_weights_while_hidden_states_stay():
    output = run("remote_pooling.py")
    assert float(re.search(r"from one process: (\S+)", output)[1]) < 1e-4
    rounds = re.findall(r"round \d+: (\S+) bytes travelled, (\S+) bytes", output)
    travelled, stayed = zip(*([int(n.replace(",", "")) for n in sizes] for sizes in rounds), strict=True)
    assert set(travelled) == {4 * (3 * 32 * 256 + 256)}  # float32: u, c and V of each sequence, g once
    assert min(stayed) > 10 * travelled[0]


# ---- docs/openrlhf.md ----


def code_of(name):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def test_recipes_are_python():
    for code in code_of("openrlhf.md"):
        compile(code, "openrlhf.md", "exec")
