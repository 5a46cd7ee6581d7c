"""Every script in examples/ runs as it is, and prints what it claims; so does what of docs/ needs no framework."""

import copy
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from r2m import R2MRewardModel, R2MUpdater
from r2m.config import R2M
from r2m_kernels import merge_pools_with_gradient, time_weight

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


# ---- docs/verl.md, docs/openrlhf.md ----


def code_of(name):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def ends():
    """The names of docs/verl.md, section 1."""
    names = {}
    exec(code_of("verl.md")[0], names)
    return names


@pytest.mark.parametrize("name", ["verl.md", "openrlhf.md"])
def test_recipes_are_python(name):
    for code in code_of(name):
        compile(code, name, "exec")


LENGTHS = torch.tensor([5, 1, 9, 30, 2, 17, 8, 3])
GROUPS = torch.tensor([[0, 5, 2, 7], [3, 1, 6, 4]])  # rows need not come prompt by prompt


def test_the_recipes_ends_make_the_round_of_the_updater(ends, tmp_path):
    runpy.run_path(EXAMPLES / "own_rloo.py")["save_tiny_models"](tmp_path)
    torch.manual_seed(0)
    local = R2MRewardModel.from_pretrained(tmp_path / "reward_model", policy=tmp_path / "policy", inner_width=32)
    local.save_pretrained(tmp_path / "r2m")
    settings, start = R2M(learning_rate=1e-2), copy.deepcopy(local)
    prompts, responses = ["w1 w2"] * 8, [f"w{i + 3} w{i + 9}" for i in range(8)]
    parts = [torch.randn(length, 64) for length in LENGTHS]

    remote = ends["RewardModel"](tmp_path / "r2m", tmp_path / "policy", 4, settings, device="cpu")
    u, g = remote.begin_round(prompts, responses, 3)
    pools = ends["pool_packed"](u, g, torch.cat(parts), LENGTHS)
    rewards, _ = remote.finish_round(*pools, GROUPS)

    updater = R2MUpdater(local, settings, total_steps=4, num_generations=4)
    rows = GROUPS.flatten()
    updater.begin_round(local.embed(prompts, responses)[rows], 3)
    hidden = pad_sequence(parts, batch_first=True)[rows]
    mask = torch.arange(hidden.shape[1]) < LENGTHS[rows, None] - 1
    expected = updater.score(slice(None), hidden, mask)
    updater.collect(slice(None), hidden, mask)
    updater.step(expected)
    torch.testing.assert_close(rewards[rows], expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs, before in zip(
        remote.model.named_parameters(), local.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-3 * (theirs - before).norm(), name
    remote.save(tmp_path / "saved")
    assert torch.equal(R2MRewardModel.from_pretrained(tmp_path / "saved").head.weight, remote.model.head.weight)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_recipes_pool_of_slices_merges_to_that_of_the_whole(ends, ranks):
    torch.manual_seed(0)
    total, pool, made = int(LENGTHS.sum()), ends["attention_pool_with_gradient"], []
    u, g, hidden = torch.randn(8, 16), torch.randn(16), torch.randn(total + -total % ranks, 16)
    hidden[total:] = torch.nan  # what fills up the last slice
    whole = ends["pool_packed"](u, g, hidden[:total], LENGTHS)
    # What `group` does among processes: tests/kernels/test_sharded_pool.py.
    ends["attention_pool_with_gradient"] = lambda *inputs, group, **options: (
        made.append(pool(*inputs, **options)) or made[-1]
    )
    for rank, part in enumerate(hidden.chunk(ranks)):
        ends["dist"] = SimpleNamespace(get_rank=lambda group, rank=rank: rank)
        ends["pool_packed"](u, g, part, LENGTHS, group="some ranks")
    pooled, gradient, _ = merge_pools_with_gradient(*map(torch.stack, zip(*made, strict=True)), g, scale=1.0)
    torch.testing.assert_close((pooled[::2], gradient[::2]), whole, rtol=1e-5, atol=1e-5)
