"""The files that a run and `r2m label` share."""

import json
import logging

import pytest

from r2m.preferences import queue

QUESTIONS = [
    {"id": f"3-{i}", "round": 3, "prompt": "a\u2028 b", "first": "x\ny", "second": "z", "reward": 0.4} for i in range(3)
]


@pytest.fixture
def folder(tmp_path):
    queue.ask(tmp_path, QUESTIONS[:2])
    queue.ask(tmp_path, QUESTIONS[2:])
    return tmp_path


def test_what_is_asked_is_read_and_what_is_answered_stands_until_taken_back(folder):
    assert list(queue.questions(folder).values()) == QUESTIONS
    queue.answer(folder, "3-0", 1, by="ann", left="second")
    queue.answer(folder, "3-1", None, by="bob", left="first")
    queue.answer(folder, "3-2", 0.5, by="bob", left="first")
    assert queue.answers(folder) == {"3-0": 1, "3-1": None, "3-2": 0.5}
    queue.undo(folder, "3-0", by="ann")
    assert queue.answers(folder) == {"3-1": None, "3-2": 0.5}
    queue.answer(folder, "3-0", 0, by="ann", left="second")
    assert queue.answers(folder) == {"3-1": None, "3-2": 0.5, "3-0": 0}


def test_a_reader_goes_on_where_it_stopped(folder):
    asked, said = {}, {}
    end = queue.new_questions(folder, asked)
    queue.ask(folder, [QUESTIONS[0] | {"id": "4-0"}])
    assert queue.new_questions(folder, asked, end) == (folder / queue.QUESTIONS).stat().st_size
    assert list(asked) == ["3-0", "3-1", "3-2", "4-0"]
    queue.answer(folder, "3-0", 1, by="ann", left="first")
    end, _ = queue.new_answers(folder, said, asked)
    queue.undo(folder, "3-0", by="ann")
    queue.answer(folder, "4-0", 0, by="ann", left="first")
    assert queue.new_answers(folder, said, asked, end) == ((folder / queue.ANSWERS).stat().st_size, 0)
    assert {id: row["label"] for id, row in said.items()} == {"4-0": 0}


def test_a_line_that_a_kill_cut_short_is_left_out_and_removed_by_the_next_write(folder):
    file = folder / queue.QUESTIONS
    with file.open("a") as stream:
        stream.write('{"id": "4-')
    cut = file.read_bytes()
    assert list(queue.questions(folder)) == ["3-0", "3-1", "3-2"]
    assert file.read_bytes() == cut  # another process may be writing it
    queue.ask(folder, [QUESTIONS[0] | {"id": "4-0"}])
    assert list(queue.questions(folder)) == ["3-0", "3-1", "3-2", "4-0"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"id": "3-0", "by": "x", "label": 2}', '{"id": "3-0", "label": 1}', '{"id": 3, "by": ""}'],
)
def test_a_malformed_line_is_an_error_that_names_it(folder, line):
    queue.answer(folder, "3-0", 1, by="ann", left="first")
    end, _ = queue.new_answers(folder, {}, {"3-0"})
    with (folder / queue.ANSWERS).open("a") as stream:
        stream.write(f"{line}\n")
    for offset in (0, end):
        with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: .* mend or remove the line"):
            queue.new_answers(folder, {}, {"3-0"}, offset)


def test_an_answer_to_what_was_never_asked_is_counted_and_left_out(folder, caplog):
    queue.answer(folder, "9-9", 1, by="ann", left="first")
    queue.answer(folder, "3-0", 1, by="ann", left="first")
    said = {}
    with caplog.at_level(logging.WARNING):
        assert queue.new_answers(folder, said, queue.questions(folder))[1] == 1
    assert list(said) == ["3-0"] and "9-9 was never asked" in caplog.text


def test_an_id_has_one_question(folder):
    queue.ask(folder, QUESTIONS[:1])  # again the same: a run that was resumed
    assert len(queue.questions(folder)) == 3
    queue.ask(folder, [QUESTIONS[0] | {"first": "other"}])
    with pytest.raises(ValueError, match="two questions of the id 3-0: it is of two runs"):
        queue.questions(folder)


def test_a_file_that_has_become_shorter_is_an_error(folder):
    end = queue.new_questions(folder, {})
    (folder / queue.QUESTIONS).write_text(json.dumps(QUESTIONS[0]) + "\n")
    with pytest.raises(ValueError, match="has become shorter"):
        queue.new_questions(folder, {}, end)


def test_a_full_disk_is_an_error_and_leaves_the_file_as_it_was(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    queue.answer(folder, "3-0", 1, by="ann", left="first")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"answers\.jsonl cannot be written: No space left"):
            queue.answer(folder, "3-1", 1, by="ann", left="first")
    assert queue.answers(folder) == {"3-0": 1}
