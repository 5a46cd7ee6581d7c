"""What a row of a benchmark says: correctness, times, memory; and the files that rows go into."""

import csv
import json
from dataclasses import fields

import pytest
import torch

from r2m_kernels.bench import measure as core
from r2m_kernels.bench.measure import measure, relative_error, summarize
from r2m_kernels.bench.results import Results, Row, describe, format_table

CPU = torch.device("cpu")
ONES = [torch.ones(3, dtype=torch.float64)]
MB = 10**6


def row(provider="ours", **values):
    return Row("ops", "op", "forward", "tiny", provider, "float32", {"B": 2}, **values)


def measured(*entries, exact=ONES):
    """The rows of functions by name; nothing here asks how long they take."""
    named = [(row(name, ideal_bytes=1000), run) for name, run in entries]
    return measure(named, exact, 1e-3, device=CPU, best_bandwidth=1e6, seconds=0.0)


def raising(error):
    def run():
        raise error

    return run


# ---- correctness ----


def test_a_right_result_is_measured():
    (found,) = measured(("right", lambda: torch.ones(3)))
    assert (found.status, found.error) == ("ok", 0.0)
    assert 0 < found.p20 <= found.median <= found.p80
    assert found.runs >= 2 and found.noise is not None
    assert (found.peak_bytes, found.launches) == (12, None)
    assert found.ideal == 1e-3
    assert found.bandwidth == 1000 / found.median and found.fraction_of_ideal == 1e-3 / found.median


def test_a_gpu_waits_before_the_first_event_while_the_host_launches(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: order.append("event")
            self.synchronize = lambda: order.append("wait")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    taken, host = core._seconds(lambda: order.append("run"), torch.device("cuda"))
    assert order == ["wait", "sleep", "event", "run", "event", "wait"]
    assert taken == 0.25 and 0 < host < 0.25


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (torch.full((3,), 1.1), "wrong: relative error 1.0e-01"),
        (torch.tensor([1.0, 1.0, float("nan")]), "wrong: relative error inf"),
        (torch.tensor([1.0, 1.0, float("inf")]), "wrong: relative error inf"),
    ],
)
def test_a_wrong_result_has_no_times(result, status):
    wrong, right = measured(("wrong", lambda: result), ("right", lambda: torch.ones(3)))
    assert wrong.status == status
    assert wrong.median is wrong.p20 is wrong.peak_bytes is wrong.ideal is None and wrong.runs == 0
    assert right.status == "ok" and right.median > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("impl='triton' cannot run: no GPU\nand more"), "cannot run: no GPU"),
        (RuntimeError("no kernel"), "cannot run: no kernel"),
        (RuntimeError(), "cannot run: RuntimeError"),
        (ImportError("No module named 'flash_attn'"), "cannot run: No module named 'flash_attn'"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (KeyError("of a compiler"), "failed: KeyError: \"'of a compiler'\""),
    ],
)
def test_who_cannot_run_says_why_and_the_others_are_measured(error, status):
    unable, able = measured(("unable", raising(error)), ("able", lambda: torch.ones(3)))
    assert unable.status == status and unable.median is unable.error is None
    assert able.status == "ok" and able.median > 0


def test_a_mistake_in_the_benchmark_itself_is_raised():
    with pytest.raises(ValueError, match="zip"):
        measured(("two results", lambda: (torch.ones(3), torch.ones(3))))


def test_a_row_that_was_given_up_before_is_not_run():
    given_up = row(status="cannot run: needs 10.0 GB")
    run = raising(AssertionError("it was run"))
    assert measure([(given_up, run)], ONES, 1e-3, device=CPU, best_bandwidth=1.0, seconds=0.0) == [given_up]
    assert given_up.median is None


def test_the_relative_error_is_that_of_the_worst_result():
    exact = [torch.tensor([3.0, 4.0]).double(), torch.tensor([2.0]).double()]
    assert relative_error([torch.tensor([3.0, 0.0]), torch.tensor([2.5])], exact) == pytest.approx(4 / 5)
    assert relative_error([torch.tensor([3.0, 4.0]), torch.tensor([2.5])], exact) == pytest.approx(1 / 4)
    assert relative_error([torch.tensor([float("nan"), 4.0]), torch.tensor([2.0])], exact) == float("inf")


# ---- times and memory ----


def test_medians_quantiles_and_noise():
    found = row()
    summarize(found, [1.0, 10.0, 3.0, 2.0], [2.0, 4.0, 6.0])
    assert (found.runs, found.median, found.p20, found.p80) == (7, 3.0, 2.0, 6.0)
    assert found.noise == pytest.approx((4 - 2.5) / 3.25) and found.spread == (6.0 - 2.0) / 3.0
    once = row()
    summarize(once, [5.0])
    assert (once.runs, once.median, once.p20, once.p80, once.noise, once.spread) == (1, 5.0, 5.0, 5.0, None, 0.0)
    assert row().spread is None


def test_two_medians_that_agree_do_not_hide_runs_that_do_not():
    found = row()
    summarize(found, [1.0, 5.0, 12.0], [1.0, 5.1, 12.0])
    assert found.noise < 0.03 < 2 < found.spread
    head, line = format_table([found]).splitlines()[1:]
    assert "noise" not in head and head.split()[4] == "spread" and line.split()[4:6] == ["218", "%"]


def test_peak_memory_is_the_most_that_lies_there_at_once():
    kept = torch.ones(MB // 4)  # an input: not counted

    def freed_before_the_result():
        torch.empty(10 * MB, dtype=torch.uint8)
        return kept + 0

    def freed_after_the_result():
        temporary = torch.empty(10 * MB, dtype=torch.uint8)
        result = kept + 0
        del temporary
        return result

    first, second = measured(
        ("freed", freed_before_the_result),
        ("held", freed_after_the_result),
        exact=[kept.double()],
    )
    assert abs(first.peak_bytes - 10 * MB) < 1000
    assert abs(second.peak_bytes - 11 * MB) < 1000


def test_every_series_has_its_runs_and_its_end():
    calls = []
    series = core._take_turns([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 0.0)
    assert calls == ["a", "b"] * 2  # in turn
    assert [[len(one) for one in two] for two, _ in series] == [[1, 1], [1, 1]]
    ((fast, host),) = core._take_turns([lambda: None], CPU, 60.0)
    assert [len(one) for one in fast] == [core._MOST_RUNS] * 2 and host == []


def test_bandwidths_are_positive(monkeypatch):
    monkeypatch.setattr(core, "_COLD_BYTES", 2**20)
    found = core.bandwidth(CPU)
    assert found.keys() == {"read", "copy"} and min(found.values()) > 0


# ---- files and tables ----


@pytest.fixture
def results():
    rows = [
        row("ours", median=2e-3, p20=1.9e-3, p80=2.1e-3, noise=0.01, ideal_bytes=4000, ideal=1e-3, parts={"a": 1.0}),
        row("theirs", status="cannot run: no GPU"),
    ]
    return Results("python benchmarks/run.py", {"device": "a CPU"}, {"read": 2.0, "copy": 1.0}, rows)


def test_results_come_back_as_they_were(results, tmp_path):
    results.save(tmp_path / "new" / "ops.json")
    assert Results.load(tmp_path / "new" / "ops.json") == results


def test_the_csv_has_every_field_and_what_follows_from_them(results, tmp_path):
    results.save(tmp_path / "ops.json")
    with (tmp_path / "ops.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [field.name for field in fields(Row)] + ["bandwidth", "fraction_of_ideal"]
    assert (first["median"], first["bandwidth"], first["fraction_of_ideal"]) == ("0.002", "2000000.0", "0.5")
    assert json.loads(first["shape"]) == {"B": 2} and json.loads(first["parts"]) == {"a": 1.0}
    assert (second["status"], second["median"], second["bandwidth"]) == ("cannot run: no GPU", "", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "format 2, expected 1"),
        ("not JSON", "not results of a benchmark"),
        ("[]", "not results of a benchmark"),
        ('"text"', "not results of a benchmark"),
        ('{"format": 1}', "not results of a benchmark"),
        ('{"format": 1, "command": "", "machine": {}, "bandwidth": {}, "rows": [{"x": 1}]}', "unexpected keyword"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "ops.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Results.load(tmp_path / "ops.json")
    assert str(tmp_path / "ops.json") in str(error.value)


def test_a_table_shows_a_status_in_the_place_of_numbers(results):
    title, head, ours, theirs = format_table(results.rows).splitlines()
    assert title == "op, forward: tiny, float32, B=2"
    assert head.split()[:3] == ["median", "ms", "p20"]
    assert ours.split() == ["ours", "2.00", "1.90", "2.10", "10", "%", "-", "-", "-", "0.002", "50", "%"]
    assert theirs.split(maxsplit=1) == ["theirs", "cannot run: no GPU"]


def test_the_machine_is_described_without_its_paths():
    machine = describe(CPU)
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert not [value for value in machine.values() if str(value).startswith(("/", "~"))]
    json.dumps(machine)
