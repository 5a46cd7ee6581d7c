import json
import math

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from r2m.plots import BANDS, COMPARISON_PANELS, RUN_PANELS, dress, plot_calibration, plot_comparison, plot_run


def rows(count, leave_out=()):
    keys = {key for _, _, labels in RUN_PANELS for key in labels} | {end for ends in BANDS.values() for end in ends}
    keys -= set(leave_out)
    return [{"round": t} | {key: math.sin(t + len(key)) for key in sorted(keys)} for t in range(1, count + 1)]


def write(path, metrics):
    path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return path


def size(path):
    height, width = matplotlib.image.imread(path).shape[:2]
    return height, width


@pytest.mark.parametrize("rounds", [1, 3])
def test_run(tmp_path, rounds):
    out = tmp_path / "plots" / "run.png"
    plot_run(write(tmp_path / "metrics.jsonl", rows(rounds)), out)
    assert size(out)[1] > 1000


def test_panels_without_metrics_are_left_out(tmp_path):
    plot_run(write(tmp_path / "all.jsonl", rows(2)), tmp_path / "all.png")
    plot_run(write(tmp_path / "few.jsonl", [{"round": 1, "policy/kl": 1.0, "judge/gold": None}]), tmp_path / "few.png")
    assert size(tmp_path / "few.png")[0] < size(tmp_path / "all.png")[0] / 3
    assert size(tmp_path / "few.png")[1] < size(tmp_path / "all.png")[1] / 2


def test_metrics_that_are_not_numbers_or_appear_late(tmp_path):
    metrics = [{"round": t, "policy/kl": 1.0 * t, "judge/gold": 0.1 * t} for t in (1, 2, 3)]
    metrics[1]["policy/kl"] = math.nan
    del metrics[0]["judge/gold"]
    path = write(tmp_path / "metrics.jsonl", metrics)
    plot_run(path, tmp_path / "run.png")
    plot_comparison({"one": path}, tmp_path / "comparison.png")
    assert size(tmp_path / "run.png") and size(tmp_path / "comparison.png")


def test_comparison_of_runs_that_differ_in_length_and_metrics(tmp_path):
    judge_free = write(tmp_path / "a.jsonl", rows(2, leave_out=["judge/gold", "rm/pair_accuracy"]))
    full = write(tmp_path / "b.jsonl", rows(5))
    plot_comparison({"a": judge_free}, tmp_path / "a.png")
    plot_comparison({"a": judge_free, "b": full}, tmp_path / "both.png")
    assert len(COMPARISON_PANELS) == 9
    assert size(tmp_path / "a.png")[0] < size(tmp_path / "both.png")[0]  # 6 panels in two rows, 9 in three


@pytest.mark.parametrize("names", [["w = 1"], ["w = 1", "w = 0.6"]])
def test_calibration_of_few_bins_and_many(tmp_path, names):
    bins = [(0.5, 0.0, 1), (0.62, 0.7, 10), (1.0, 1.0, 1)]
    plot_calibration({name: bins[number:] for number, name in enumerate(names)}, tmp_path / "plots" / "out.png")
    assert size(tmp_path / "plots" / "out.png") == (600, 552)


def test_empty_metrics(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no rounds to plot"):
        plot_run(write(tmp_path / "metrics.jsonl", []), tmp_path / "run.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_run(write(tmp_path / "metrics.jsonl", [{"round": 1}]), tmp_path / "run.png")


def test_pyplot_is_left_alone(tmp_path):
    import matplotlib.pyplot

    backend, figures = matplotlib.get_backend(), matplotlib.pyplot.get_fignums()
    plot_run(write(tmp_path / "metrics.jsonl", [{"round": 1, "policy/kl": 0.0}]), tmp_path / "run.png")
    assert (matplotlib.get_backend(), matplotlib.pyplot.get_fignums()) == (backend, figures)


def test_half_a_row_of_a_run_that_is_going_on_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "policy/kl": 0.5}\n{"round": 2, "poli')
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").stat().st_size > 0


def test_rounds_and_depths_are_whole_numbers():
    for label in ("round", "depth (layers)"):
        ax = Figure().add_subplot()
        ax.plot([0, 1, 2, 3], [0, 1, 2, 3])
        dress(ax, "", label, "")
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
