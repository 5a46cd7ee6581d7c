import matplotlib.figure
import matplotlib.pyplot
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from r2m_kernels.bench import plots
from r2m_kernels.bench.plots import COLORS, format_bytes, format_seconds, plot_growth, plot_providers, plot_update
from r2m_kernels.bench.results import Results, Row

pytestmark = pytest.mark.filterwarnings("error")  # a layout that collapses is a warning

SHAPE = {"B": 64, "S": 1024, "D_p": 4096, "D_rm": 4096, "d": 2048, "heads": 1}
MEASURED = {"median": 2e-3, "p20": 1e-3, "p80": 4e-3, "ideal": 5e-4, "peak_bytes": 10**6}


def row(
    provider="extension", case="over S", mode="forward+backward", op="policy_feedback_reward", shape=SHAPE, **other
):
    return Row("ops", op, mode, case, provider, "bfloat16", shape, **(MEASURED | other))


def not_run(provider, **other):
    return row(provider, median=None, status="cannot run: No module named 'flash_attn' " + 20 * "and more ", **other)


def results(rows):
    return Results("command", {"device": "A GPU"}, {"read": 1e12, "copy": 2e12}, rows)


@pytest.fixture
def figures(monkeypatch):
    """What is drawn from now on."""
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw))
    )
    return drawn


def titles(figure):
    return [ax.get_title().strip() for ax in figure.axes]


def sweep(case, key, sizes):
    return [row(p, case, shape=SHAPE | {key: size}) for size in sizes for p in ("projected, eager", "extension")]


def test_growth_has_a_panel_for_every_sweep(tmp_path, figures):
    everything = sweep("over S", "S", [128, 256]) + sweep("over B", "B", [1, 2]) + sweep("over D", "D_p", [576, 8192])
    plot_growth(results(everything), tmp_path / "plots" / "all.png", "0f" * 32)
    plot_growth(results(sweep("over B", "B", [4])), tmp_path / "one.png")
    assert titles(figures[0]) == ["Time over S", "Time over B", "Time over D", "Peak memory over S"]
    assert titles(figures[1]) == ["Time over B"]
    with Image.open(tmp_path / "plots" / "all.png") as image, Image.open(tmp_path / "one.png") as one:
        assert image.info["Source"] == "0f" * 32
        assert "Source" not in one.info
        assert image.width == 816 and image.height > 600
        assert one.width == 408 and one.height < 450


def test_growth_draws_times_bands_and_bounds(tmp_path, figures):
    faster = {"median": 3e-3, "p20": 2e-3, "p80": 5e-3, "ideal": 1e-3, "peak_bytes": 4 * 10**6}
    # Not in order, and with rows that do not belong there.
    rows = [row(shape=SHAPE | {"S": 256}, **faster), row(shape=SHAPE | {"S": 128}), row("triton", mode="forward")]
    rows += [row("triton", "llama-3-8b"), not_run("triton")]
    plot_growth(results(rows), tmp_path / "growth.png")
    time, memory = figures[0].axes
    lines = {line.get_label(): line for line in time.lines}
    assert lines.keys() == {"extension", "ideal"}
    assert list(lines["extension"].get_xdata()) == [128, 256]
    assert list(lines["extension"].get_ydata()) == pytest.approx([2, 3])
    assert list(lines["ideal"].get_ydata()) == pytest.approx([0.5, 1])
    (band,) = time.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(128, 1), (128, 4), (256, 2), (256, 5)}
    lines = {line.get_label(): line for line in memory.lines}
    assert list(lines["extension"].get_ydata()) == [1, 4]
    # 64 sequences of 128 or 256 rows of 4096 bfloat16 values.
    assert list(lines["bytes of hidden"].get_ydata()) == [67.108864, 134.217728]
    assert (time.get_yscale(), memory.get_yscale(), time.get_xscale()) == ("log", "log", "log")


def test_a_provider_has_one_colour_everywhere(tmp_path, figures):
    plot_growth(results(sweep("over S", "S", [128, 256])), tmp_path / "growth.png")
    plot_providers(results([row("projected, eager"), row("extension")]), tmp_path / "providers.png")
    update = {"op": "reward_model_update", "mode": "update", "case": "h resident"}
    update_rows = [row("plain PyTorch, projected", **update), row("extension", **update)]
    plot_update(results(update_rows), tmp_path / "update.png")
    lines = {line.get_label(): to_hex(line.get_color()).upper() for line in figures[0].axes[0].lines}
    assert lines["projected, eager"] != lines["extension"] and lines["ideal"] == COLORS[-1]
    for figure in figures[1:]:
        for ax in figure.axes:
            colors = [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
            assert colors == [lines["projected, eager"], lines["extension"]]


def test_providers_are_labelled_with_time_and_ratio(tmp_path, figures):
    rows = [row("absorbed, eager", median=9.2e-3), not_run("projected, flash_attn"), row("extension")]
    rows += [row("extension", mode="score", median=5e-5)]
    plot_providers(results(rows), tmp_path / "providers.png")
    both, score = figures[0].axes
    assert titles(figures[0])[0].splitlines()[0] == "policy_feedback_reward, forward+backward: over S"
    assert [label.get_text() for label in both.get_yticklabels()] == [r.provider for r in rows[:3]]
    written = [text.get_text() for text in both.texts]
    assert written[0] == "9.20 ms, 4.60 x" and written[2] == "2.00 ms, 1.00 x"
    assert written[1].startswith("cannot run: No module named 'flash_attn'") and len(written[1]) <= 90
    assert [text.get_text() for text in score.texts] == ["50.0 µs, 1.00 x"]
    assert [list(line.get_xdata()) for line in both.lines] == [[0.5, 0.5]]  # the ideal
    assert both.get_xscale() == "log"
    with Image.open(tmp_path / "providers.png") as image:
        assert image.width == 816


def test_update_shows_time_and_memory_by_case(tmp_path, figures):
    update = {"op": "reward_model_update", "mode": "update"}
    rows = []
    for case in ("h resident", "h streamed"):
        rows += [row("triton", case, **update, median=0.4, peak_bytes=5 * 10**8, held_bytes=10**9)]
        rows += [not_run("extension", case=case, op=update["op"])]
    plot_update(results(rows), tmp_path / "update.png", "ab")
    panels = [f"{what}, {case}" for case in ("h resident", "h streamed") for what in ("Time", "Memory beyond h")]
    assert titles(figures[0]) == panels
    time, memory = figures[0].axes[:2]
    assert [text.get_text()[:10] for text in time.texts] == ["400 ms", "cannot run"]
    assert [text.get_text()[:10] for text in memory.texts] == ["1.50 GB", "cannot run"]
    with Image.open(tmp_path / "update.png") as image:
        assert image.info["Source"] == "ab" and image.width == 816


def test_nothing_to_plot(tmp_path):
    for plot in (plot_growth, plot_providers, plot_update):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot(results([]), tmp_path / "none.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_growth(results([not_run("triton")]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_rows_without_any_time_can_be_drawn(tmp_path):
    update = {"op": "reward_model_update", "case": "h resident"}
    plot_update(results([not_run("all", **update)]), tmp_path / "update.png")
    plot_providers(results([not_run("all")]), tmp_path / "providers.png")


def test_pyplot_is_left_alone(tmp_path):
    backend, figures = matplotlib.get_backend(), matplotlib.pyplot.get_fignums()
    plot_providers(results([row()]), tmp_path / "providers.png")
    assert (matplotlib.get_backend(), matplotlib.pyplot.get_fignums()) == (backend, figures)


def test_units():
    assert [format_seconds(x) for x in (12.34, 0.1234, 5.6e-5, 2e-7)] == ["12.3 s", "123 ms", "56.0 µs", "0.200 µs"]
    assert [format_bytes(x) for x in (2.5e9, 1e6, 1234, 0)] == ["2.50 GB", "1.00 MB", "1.23 kB", "0.000 kB"]
    assert plots.memory(row(held_bytes=5)) == 10**6 + 5 and plots.memory(row(peak_bytes=None)) is None
