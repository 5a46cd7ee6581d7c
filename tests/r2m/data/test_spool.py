"""Pairs that are too many for memory: read from a file without a name, they are what they are in a list."""

import random
import tempfile

import pytest

from r2m.commands.fit_reward import split_pairs
from r2m.data import spool
from r2m.data.sources import Preference, load_pairs
from r2m.data.spool import OnDisk, picked

PAIRS = [Preference(f"p{i % 4}", f"a{i}é\n", f"b{i}\u2028") for i in range(20)]
PAIRS[3] = Preference([{"role": "user", "content": "hi"}], "yes", "no")


def spooled(monkeypatch, limit):
    monkeypatch.setattr(spool, "IN_MEMORY", limit)
    rows = spool.Spool(Preference)
    for pair in PAIRS:
        rows.append(pair)
    assert len(rows) == len(PAIRS)
    return rows.sequence()


@pytest.mark.parametrize("limit", [0, 200, 10**9])
def test_rows_are_those_that_came_wherever_they_are(monkeypatch, limit):
    rows = spooled(monkeypatch, limit)
    assert isinstance(rows, OnDisk) == (limit < 10**9)
    assert list(rows) == PAIRS and rows[-1] == PAIRS[-1] and list(rows[4:9]) == PAIRS[4:9]
    assert list(picked(picked(rows, [7, 3, 3, 0]), [2, 0])) == [PAIRS[3], PAIRS[7]]
    assert random.Random(0).sample(rows, 5) == random.Random(0).sample(PAIRS, 5)
    with pytest.raises(IndexError):
        rows[len(PAIRS)]


def test_a_split_is_the_same_on_disk(monkeypatch):
    on_disk = [list(part) for part in split_pairs(spooled(monkeypatch, 0), 0, 6)]
    assert on_disk == [list(part) for part in split_pairs(PAIRS, 0, 6)] and len(on_disk[1]) > 0


def test_many_pairs_of_a_file_stay_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "IN_MEMORY", 100)
    rows = ["prompt,chosen,rejected", *(f"{i},a,b" for i in range(9))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    pairs = load_pairs(tmp_path / "pairs.csv")
    assert isinstance(pairs, OnDisk) and [pair.prompt for pair in pairs] == [str(i) for i in range(9)]


def test_a_disk_that_is_full_says_what_to_do(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left.* expected free space .*TMPDIR"):
        spooled(monkeypatch, 0)
