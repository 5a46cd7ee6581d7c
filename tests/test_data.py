import json

import pytest

from r2m.data import Preference, load_prompts


def test_jsonl_keeps_text_and_chat_messages(tmp_path):
    chat = [{"role": "user", "content": "Héllo"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "  one", "id": 3}) + "\n\n" + json.dumps({"prompt": chat}) + "\n")
    assert load_prompts(path) == ["  one", chat]
    assert load_prompts(str(path)) == ["  one", chat]


def test_jsonl_line_may_hold_any_unicode_line_separator(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_prompts(path) == ["a\u2028b\x85c"]


def test_txt_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"first \r\n\n  \nsecond")
    assert load_prompts(path) == ["first ", "second"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: no prompts, the file is empty"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 7: not valid JSON"),
        ('{"text": "a", "id": 1}', r"line 7: the field \"prompt\" is missing, found \['id', 'text'\]"),
        ('"just text"', r"line 7: expected an object with the field \"prompt\", got \"just text\""),
        ('{"prompt": " "}', r"line 7, field \"prompt\": expected non-empty text"),
        ('{"prompt": 5}', r"line 7, field \"prompt\": .*got 5"),
        ('{"prompt": []}', r"line 7, field \"prompt\": .*got \[\]"),
        ('{"prompt": [{"role": "user"}]}', r"line 7, field \"prompt\": .*a list of messages"),
        ('{"prompt": ["hi"]}', r"line 7, field \"prompt\""),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' * 6 + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, " + message):
        load_prompts(path)


def test_long_values_are_shortened_in_errors(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": ["x" * 1000]}))
    with pytest.raises(ValueError, match=r"\.\.\.$") as error:
        load_prompts(path)
    assert len(str(error.value)) < 400


def test_unknown_suffix_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.csv: expected a file named \*\.jsonl or \*\.txt"):
        load_prompts(tmp_path / "prompts.csv")
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "prompts.txt")


def test_preference_is_a_value():
    assert Preference("p", "c", "r") == Preference("p", chosen="c", rejected="r")
    assert len({Preference("p", "c", "r"), Preference("p", "c", "r")}) == 1
