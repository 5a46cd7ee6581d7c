"""`r2m report`: one file with all that a run's folder says."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from r2m.cli import app
from r2m.commands.report import LONGEST

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> & \u2028\ud800"


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a<b>"
    folder.mkdir()
    sample = {"prompt": [{"role": "user", "content": HOSTILE}], "response": HOSTILE, "reward": 1.5, "initial": -0.25}
    write(folder / "metrics.jsonl", [{"round": t, "reward/mean": t / 3, "policy/kl": 0.1 * t} for t in (1, 2)])
    write(folder / "samples.jsonl", [{"round": t, "best": [sample], "worst": [sample]} for t in (1, 2)])
    write(folder / "warnings.jsonl", [{"round": 2, "message": f"round 2: {HOSTILE}"}])
    label = {"prompt": HOSTILE, "first": "x" * 2 * LONGEST, "second": "", "round": 1}
    write(folder / "labels.jsonl", [label | {"label": value} for value in (1, 0.5, None, 0)])
    (folder / "config.yaml").write_text("policy: <i>\n")
    return folder


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_report_has_curves_warnings_samples_and_labels_and_nothing_that_runs(run):
    result = report(run)
    assert (result.exit_code, result.stdout) == (0, f"{run}/report.html\n"), result.output
    page = Reader((run / "report.html").read_text())
    assert not {"script", "b", "i", "link"} & {tag for tag, _ in page.tags}
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    shown = HOSTILE.replace("\ud800", "?")
    assert page.text.count(shown) == 1 + 2 * 2 * 2 + 3  # a warning; prompt and response of the samples; labels' prompts
    assert "best: reward 1.500, initial reward model -0.250" in page.text
    assert "3 of 4 labels" in page.text and "the first is better: 0.5" in page.text and "skipped" in page.text
    assert f"... ({2 * LONGEST} characters)" in page.text and "policy: <i>" in page.text
    assert re.search(r"round\s*reward\s*KL\s*1\s*0.3333\s*0.1", page.text)


def test_a_run_that_kept_no_samples_has_a_report_too(run, tmp_path):
    for name in ("samples", "warnings", "labels"):
        (run / f"{name}.jsonl").unlink()
    (run / "config.yaml").unlink()
    assert report(run, "--output", tmp_path / "out.html").exit_code == 0
    text = Reader((tmp_path / "out.html").read_text()).text
    assert "None." in text and "The folder has no samples.jsonl." in text


def test_a_folder_without_a_round_and_a_file_that_cannot_be_written_are_errors(run, tmp_path):
    result = report(tmp_path)
    assert result.exit_code == 1 and "holds no metrics.jsonl with a round" in result.stderr
    result = report(run, "--output", tmp_path / "missing" / "out.html")
    assert result.exit_code == 1 and "missing/out.html" in result.stderr
