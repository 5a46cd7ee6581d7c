"""The report of benchmark results: figures worked out by hand, and what --check notices."""

import shutil
import sys

import pytest

from benchmarks import report
from r2m_kernels.bench.results import Results, Row

SHAPE = {"B": 512, "S": 1024, "D_p": 4096, "D_rm": 4096, "d": 2048, "heads": 1}
ABSENT = "cannot run: No module named 'flash_attn'"


def row(op, mode, case, provider, shape, median, dtype="bfloat16", **measured):
    """`median` in seconds, or why there is none."""
    values = {"status": median} if isinstance(median, str) else {"median": median, "p20": median, "p80": 2 * median}
    return Row("", op, mode, case, provider, dtype, shape, **values, **measured)


def ops_rows():
    pool = {key: SHAPE[key] for key in ("B", "S", "D_p")}
    rows = []
    for mode in ("score", "forward", "forward+backward"):
        # What is beside the main shape: half the batch, at other times.
        for batch, slower in ((512, 1), (256, 7)):
            times = {"projected, eager": 46e-3, "projected, flash_attn": ABSENT, "triton": 2e-3, "extension": 1e-3}
            for provider, time in times.items():
                measured = {"noise": 0.01, "peak_bytes": 3_000_000, "ideal": 0.8e-3, "launches": 3}
                measured = {} if isinstance(time, str) else measured
                time = time if isinstance(time, str) else time * slower
                arguments = (mode, "llama-3-8b", provider)
                rows.append(row("policy_feedback_reward", *arguments, SHAPE | {"B": batch}, time, **measured))
            rows.append(row("attention_pool", mode, "llama-3-8b", "extension", pool | {"B": batch}, 3e-3 * slower))
    for mode in ("forward", "forward+backward"):
        # At the largest shape, nothing is compiled: what is shown is the largest of those with all providers.
        for groups, size, eager, compiled in ((64, 8, 9.0, 9.0), (8192, 8, 8.0, 2.0), (8192, 64, 7.0, None)):
            shape = {"n": groups, "K": size}
            times = {"eager": eager, "compiled": compiled, "extension": 1.0}
            rows += [
                row("grebt_loss", mode, f"K = {size}", provider, shape, time, "float32")
                for provider, time in times.items()
                if time is not None
            ]
    sweep = [(length, provider) for length in (128, 256) for provider in ("projected, eager", "extension")]
    return rows + [
        row("policy_feedback_reward", "forward+backward", "over S", provider, SHAPE | {"S": length}, 1e-3 * length)
        for length, provider in sweep
    ]


def update_rows():
    shape = {"n": 64, "K": 8, "S": 1024, "D_p": 4096, "D_rm": 4096, "d": 2048}
    resident = {"plain PyTorch, projected": "out of memory", "plain PyTorch, absorbed": 0.5, "extension": 0.1}
    streamed = {"plain PyTorch, projected": 8.0, "plain PyTorch, absorbed": 0.2, "extension": 0.25}
    held = {"held_bytes": 10**9}
    return [
        row("reward_model_update", "update", case, provider, shape, time, peak_bytes=500_000_000, noise=0.03, **held)
        for case, times in (("h resident", resident), ("h streamed", streamed))
        for provider, time in times.items()
    ]


def round_rows():
    shape = {"n": 4, "K": 8, "S_prompt": 256, "S_response": 128, "parameters": 10**9, "trained": 10**9}
    phases = {"rollout": 5.0, "annotate": 2.0, "policy": 3.0, "reward_model": 0.0}
    plain = row("training_round", "round", "1b", "RLOO", shape, 10.0, parts=phases, peak_bytes=50 * 10**9)
    parts = phases | {"reward_model": 0.05, "R2M: GREBT and optimizer": 0.03, "R2M: rewards of a micro-batch": 0.02}
    ours = row("training_round", "round", "1b", "RLOO + R2M", shape, 10.05, parts=parts, peak_bytes=51 * 10**9)
    return [plain, ours]


def save(root, folder, name, suites, **extra):
    machine = {"device": name, "torch": "2.11.0", "triton": None, "commit": "0123456789abcdef+", **extra}
    for suite, rows in suites.items():
        results = Results(f"python benchmarks/run.py --suite {suite}", machine, {"read": 2e9, "copy": 1e9}, rows)
        results.save(root / "benchmarks" / "results" / folder / f"{suite}.json")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    (root / "docs").mkdir()
    for path in ("README.md", "docs/benchmarks.md", "docs/kernels.md"):
        (root / path).write_text(f"above\n\n{report.BEGIN}\nstale words\n{report.END}\n\nbelow\n")
    save(root, "a-cpu", "A CPU", {"ops": ops_rows(), "update": update_rows(), "round": round_rows()})
    save(root, "b-gpu", "B GPU", {"round": round_rows()}, cuda="12.8", triton="3.6.0")
    report.write(root)
    return root


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "repository")


@pytest.fixture(scope="module")
def readme(written):
    return (written / "README.md").read_text()


@pytest.fixture(scope="module")
def docs(written):
    return (written / "docs" / "benchmarks.md").read_text()


@pytest.fixture(scope="module")
def side_by_side(docs):
    """Of the CPU, what stands above its full tables."""
    cpu = docs[docs.index("## A CPU") :]
    return cpu[: cpu.index("\n### ")]


def test_only_what_is_between_the_markers_changes(readme, docs):
    for text in (readme, docs):
        assert text.startswith(f"above\n\n{report.BEGIN}\n") and text.endswith(f"{report.END}\n\nbelow\n")
        assert "stale words" not in text


def test_gpus_come_first_and_only_suites_that_are_there(readme, docs):
    assert readme.index("**B GPU**: ") < readme.index("**A CPU**: ")
    gpu = readme[: readme.index("**A CPU**: ")]
    assert "R2M's own work in a training round" in gpu and "| --- |" not in gpu and ".png" not in gpu
    assert docs.index("## B GPU") < docs.index("## A CPU")
    gpu = docs[: docs.index("## A CPU")]
    assert "A training round" in gpu
    assert "policy_feedback_reward" not in gpu and "One update" not in gpu


SIZES = "S=1024 D_p=4096 D_rm=4096 d=2048"
FOUR_ROWS = [
    f"| one update of the reward model, h streamed | n=64 K=8 {SIZES}, bfloat16 | 8.00 s, 32.0 x (projected) "
    "| 200 ms, 0.800 x (absorbed) | 250 ms (extension) |",
    f"| `policy_feedback_reward` | B=512 {SIZES} heads=1, bfloat16 | 46.0 ms, 46.0 x (eager) |  "
    "| 1.00 ms (extension) |",
    "| `attention_pool_with_gradient` | B=512 S=1024 D_p=4096, bfloat16 |  |  | 3.00 ms (extension) |",
    "| `grebt_loss` | n=8192 K=8, float32 |  | 2.00 s, 2.00 x (compiled) | 1.00 s (extension) |",
]


def test_the_readme_has_four_rows_and_a_plot(readme):
    rows = [line for line in readme.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert rows == FOUR_ROWS
    assert readme.count("![") == 1 and "](docs/benchmarks/a-cpu-growth.png)" in readme
    assert "R2M's own work in a training round: 50.0 ms of 10.1 s (1b)." in readme


def test_versions_and_commands(readme):
    assert "torch 2.11.0, triton 3.6.0, commit 0123456789ab+: `python benchmarks/run.py --suite round`\n" in readme
    commands = ", ".join(f"`python benchmarks/run.py --suite {suite}`" for suite in ("ops", "round", "update"))
    assert f"torch 2.11.0, commit 0123456789ab+: {commands}\n" in readme


def test_update_of_the_reward_model(side_by_side):
    assert "| plain PyTorch, projected | out of memory | 1.50 GB | 8.00 s, 40.0 x | 1.50 GB |" in side_by_side
    assert "| plain PyTorch, absorbed | 500 ms, 5.00 x | 1.50 GB | 200 ms, 1.00 x | 1.50 GB |" in side_by_side
    assert "| extension | 100 ms, 1.00 x | 1.50 GB | 250 ms, 1.25 x | 1.50 GB |" in side_by_side


def test_operators_at_the_main_shape(side_by_side):
    three = " ".join(["46.0 ms, 46.0 x, 2 % | 3.00 MB |"] * 3)
    assert f"| projected, eager | {three}\n" in side_by_side
    three = " ".join(["2.00 ms, 2.00 x, 40 % | 3.00 MB |"] * 3)
    assert f"| triton | {three}\n" in side_by_side
    assert side_by_side.count("| extension | 1.00 ms, 1.00 x, 80 % | 3.00 MB |") == 1
    assert side_by_side.count("| extension | 3.00 ms, 1.00 x |") == 1  # the pool
    assert "B=256" not in side_by_side


def test_what_could_not_run_says_why(side_by_side, docs):
    assert "| projected, flash_attn |" not in side_by_side
    assert docs.count(f"\n- projected, flash_attn: {ABSENT}\n") == 3  # modes


def test_small_operators_beside_eager(side_by_side):
    assert "|  |  |  | compiled | extension |\n" in side_by_side
    for mode in ("forward", "forward+backward"):
        assert f"| `grebt_loss` | {mode} | n=8192 K=8, float32 | 0.250 x | 0.125 x |\n" in side_by_side
    assert side_by_side.count("| `grebt_loss` |") == 2


def test_training_round(side_by_side):
    assert "**A training round**, 1b: n=4 K=8 S_prompt=256 S_response=128\n" in side_by_side
    assert "| 1b | RLOO | 10.0 s | 5.00 s | 2.00 s | 3.00 s | 0.000 µs |  | 50.0 GB |\n" in side_by_side
    ours = "10.1 s | 5.00 s | 2.00 s | 3.00 s | 50.0 ms | 50.0 ms (0.5 %) | 51.0 GB (+2.0 %) |\n"
    assert f"| 1b | RLOO + R2M | {ours}" in side_by_side


def test_noise(readme):
    # 18 rows at 1 % and 5 at 3 %.
    assert "Two series of the same version differ by 1.0 % in the median, 3.0 % at most." in readme


def test_every_time_is_in_the_full_tables(docs):
    cpu = docs[docs.index("## A CPU") :]
    full = cpu[cpu.index("\n### ") :]
    tables = [line for line in full.splitlines() if line.startswith("| ") and "| ---" not in line]
    heads = [line for line in tables if line.startswith(("| case |", "| seconds |"))]
    parts = [line for line in tables if line.startswith(("| r", "| annotate", "| policy", "| R2M"))]
    assert len(tables) - len(heads) - len(parts) == len(
        [row for row in ops_rows() + update_rows() + round_rows() if row.status == "ok"]
    )
    shape = "B=256 S=1024 D_p=4096 D_rm=4096 d=2048 heads=1, bfloat16"
    figures = "14.0 ms | 14.0 ms | 28.0 ms | 2.00 x | 100.0 % | 3.00 MB | 3 | 6 % |"
    assert cpu.count(f"| llama-3-8b | {shape} | triton | {figures}") == 3
    assert "| R2M: GREBT and optimizer |  | 0.030 |" in cpu
    assert "bandwidth: read 2.00 GB/s, copy 1.00 GB/s" in cpu


def test_plots_are_those_of_suites_that_have_something_to_draw(written, docs):
    names = {path.name for path in (written / "docs" / "benchmarks").iterdir()}
    assert names == {"a-cpu-growth.png", "a-cpu-update.png"}
    assert all(docs.count(f"(benchmarks/{name})") == 1 for name in names)


def test_a_cell_does_not_end_at_a_bar():
    assert report.table(["a"], [["b | c"]]) == "| a |\n| --- |\n| b \\| c |"


def test_check_passes_after_write_and_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert report.check(root) == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_check_names_what_other_results_would_change(root):
    path = root / "benchmarks" / "results" / "a-cpu" / "update.json"
    results = Results.load(path)
    results.rows[-1].median = 0.26
    results.save(path)
    names = ["README.md", "docs/benchmarks.md", "docs/benchmarks/a-cpu-update.png"]  # and no prediction
    assert [str(name) for name in report.check(root)] == names
    report.write(root)
    assert report.check(root) == []


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_check_names_a_text_that_was_edited_between_the_markers(root, name):
    path = root / name
    path.write_text(path.read_text().replace("below", "edited"))
    assert report.check(root) == []
    path.write_text(path.read_text().replace("10.1 s", "9.99 s", 1))
    assert [str(found) for found in report.check(root)] == [name]


def test_check_names_a_plot_that_is_missing(root):
    path = root / "docs" / "benchmarks" / "a-cpu-growth.png"
    path.unlink()
    assert report.check(root) == [path.relative_to(root)]


@pytest.mark.parametrize("text", ["none", report.BEGIN, f"{report.END}\n{report.BEGIN}\n"])
def test_missing_markers_stop_everything(root, text):
    (root / "docs" / "benchmarks.md").write_text(text)
    readme = (root / "README.md").read_text()
    save(root, "c-cpu", "C CPU", {"round": round_rows()})
    for function in (report.write, report.check):
        with pytest.raises(ValueError, match=r"docs/benchmarks\.md: expected the markers <!-- benchmarks: begin -->"):
            function(root)
    assert (root / "README.md").read_text() == readme


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"benchmarks/results: no results"):
        report.write(tmp_path)


def test_the_command(root, monkeypatch):
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()
    (root / "docs" / "benchmarks" / "a-cpu-growth.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert str(stopped.value.code).startswith("docs/benchmarks/a-cpu-growth.png: not what the results say")
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    assert report.check(root) == []
    (root / "README.md").unlink()
    with pytest.raises(SystemExit, match=r"README\.md"):
        report.main()


def test_the_committed_tables_and_plots_show_the_committed_results():
    assert report.check(report.ROOT) == [], "run python benchmarks/report.py"
