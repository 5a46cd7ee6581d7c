import csv
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2m.data.sources import Preference, load_pairs, load_prompts

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What colour is the sky?"}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def test_preference_is_a_value():
    assert Preference("p", "c", "r") == Preference("p", chosen="c", rejected="r")
    assert len({Preference("p", "c", "r"), Preference("p", "c", "r")}) == 1


# ---- pairs ----


def test_pairs_of_text_with_and_without_a_prompt(tmp_path):
    path = write_jsonl(
        tmp_path / "pairs.jsonl",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "score": 3},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": [USER], "chosen": "Blue.", "rejected": "Green."},
    )
    pair = Preference("The sky is", " blue.", " green.")
    assert load_pairs(path) == [pair, pair, Preference([USER], "Blue.", "Green.")]
    assert load_prompts(path) == ["The sky is", "The sky is", [USER]]


@pytest.mark.parametrize("prompt", [{}, {"prompt": USER["content"]}])
def test_conversations_share_all_but_the_last_message(tmp_path, prompt):
    turns = [SYSTEM, USER, assistant("Why?"), {"role": "user", "content": "To paint it."}]
    row = {**prompt, "chosen": [*turns, assistant("Blue.")], "rejected": [*turns, assistant("Green.")]}
    path = write_jsonl(tmp_path / "pairs.jsonl", row)
    assert load_pairs(path) == [Preference(turns, "Blue.", "Green.")]
    assert load_prompts(path) == [turns]


def test_completions_beside_a_conversation_are_one_message(tmp_path):
    row = {"prompt": [SYSTEM, USER], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}
    assert load_pairs(write_jsonl(tmp_path / "p.jsonl", row)) == [Preference([SYSTEM, USER], "Blue.", "Green.")]


letters = st.text(st.characters(categories=["L", "N"]), min_size=1)


@given(prompt=st.text().filter(str.strip), chosen=letters, rejected=letters)
def test_an_implicit_prompt_and_its_completions_make_up_the_texts(prompt, chosen, rejected):
    chosen, rejected = "a" + chosen, "b" + rejected
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder, "pairs.jsonl"), row)
        (pair,) = load_pairs(path)
        assert load_prompts(path) == [pair.prompt]
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert pair.prompt == prompt.removesuffix(" ")


def test_a_conversation_repeated_in_both_fields_is_a_prompt_but_no_pair(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("a")]})
    assert load_prompts(path) == [[USER]]
    with pytest.raises(ValueError, match=r'line 1: the fields "chosen" and "rejected" are equal'):
        load_pairs(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "rejected": "b"}, r": the field \"chosen\" is missing, found \['prompt', 'rejected'\]"),
        (["a"], r': expected an object with the field "chosen", got \["a"\]'),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, r', field "prompt": expected non-empty text'),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, r', field "rejected": expected non-empty text .*got " "'),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, r', field "chosen": .*got null'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r': the fields "chosen" and "rejected" are equal: "b"'),
        ({"chosen": "same", "rejected": "same"}, r": the fields .* are equal"),
        ({"chosen": "yes", "rejected": "no"}, r": the fields .* share no prompt"),
        ({"chosen": " yes", "rejected": " no"}, r": the fields .* share no prompt"),
        ({"chosen": "ab", "rejected": "abc"}, r', field "chosen": .*after the prompt, got ""'),
        ({"chosen": "text", "rejected": [USER, assistant("b")]}, r', field "chosen": .*got "text"'),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, r": the fields .* share no prompt"),
        ({"chosen": [USER, assistant("a")], "rejected": [SYSTEM, assistant("b")]}, r": .* share no prompt"),
        (
            {"chosen": [SYSTEM, USER], "rejected": [SYSTEM, assistant("b")]},
            r', field "chosen": .*one message of the as',
        ),
        ({"prompt": [USER], "chosen": [USER, assistant("a")], "rejected": "b"}, r', field "chosen": .*one message'),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, row, message):
    fine = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write_jsonl(tmp_path / "pairs.jsonl", fine, fine, row)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 3" + message):
        load_pairs(path)


def test_a_missing_field_names_file_line_and_field(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(10_001)]
    assert len(load_pairs(write_jsonl(tmp_path / "pairs.jsonl", *rows))) == 10_001
    del rows[9_999]["chosen"]
    message = (
        "pairs.jsonl, line 10000: the field \"chosen\" is missing, found ['prompt', 'rejected']; where it has another "
        "name, columns says which, such as prompt=question"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        load_pairs(write_jsonl(tmp_path / "pairs.jsonl", *rows))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}],
            "images and other parts are not supported",
        ),
        ([USER, assistant("Blue.")], "ends with the assistant's turn"),
        ([SYSTEM, {"role": "user", "content": " "}], "last message is empty"),
    ],
)
def test_messages_that_cannot_be_answered_are_an_error(tmp_path, prompt, message):
    path = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": prompt})
    with pytest.raises(ValueError, match=rf'prompts\.jsonl, line 1, field "prompt": .*{message}'):
        load_prompts(path)


def test_pairs_do_not_come_from_a_txt_file_or_an_empty_one(tmp_path):
    (tmp_path / "pairs.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"pairs\.txt: a \.txt file holds prompts only"):
        load_pairs(tmp_path / "pairs.txt")
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no pairs, the file is empty"):
        load_pairs(write_jsonl(tmp_path / "pairs.jsonl"))


# ---- columns ----


def test_columns_name_the_fields(tmp_path):
    row = {"question": "Sky?", "prompt": "unused", "better": "Blue.", "worse": "Green."}
    path = write_jsonl(tmp_path / "pairs.jsonl", row)
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert load_pairs(path, columns=columns) == [Preference("Sky?", "Blue.", "Green.")]
    assert load_prompts(path, columns={"prompt": "question"}) == ["Sky?"]


def test_errors_name_the_column_that_a_field_is_read_from(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", {"question": 5})
    with pytest.raises(ValueError, match=r'line 1, field "question": .*got 5'):
        load_prompts(path, columns={"prompt": "question"})


def test_prompts_need_no_columns_of_pairs(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "Sky?"}\n')
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert load_prompts(path, columns=columns) == ["Sky?"]
    with pytest.raises(ValueError, match='line 1: the field "better" is missing'):
        load_pairs(path, columns=columns)


def test_columns_that_do_not_exist_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": "a", "id": 1})
    with pytest.raises(ValueError, match="columns: unknown field 'promt'; expected 'prompt', 'chosen', 'rejected'"):
        load_prompts(path, columns={"promt": "prompt"})
    with pytest.raises(ValueError, match=r"line 1: the field \"question\" is missing, found \['id', 'prompt'\]"):
        load_prompts(path, columns={"prompt": "question"})


# ---- csv ----


def write_csv(path, *rows):
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet does
        csv.writer(file).writerows(rows)
    return path


def test_csv_fields_hold_quotes_commas_newlines_and_messages(tmp_path):
    text = 'He said "no",\r\nthen\nleft.'
    path = write_csv(
        tmp_path / "pairs.csv",
        ["prompt", "chosen", "rejected", "note"],
        [text, "a", "b", "[{'not': JSON}]"],
        [],
        [json.dumps([SYSTEM, USER]), json.dumps([assistant("[1]")]), "[2]", ""],
    )
    assert load_pairs(path) == [Preference(text, "a", "b"), Preference([SYSTEM, USER], "[1]", "[2]")]
    assert load_prompts(path) == [text, [SYSTEM, USER]]


def test_a_csv_error_names_the_line_on_which_its_row_starts(tmp_path):
    path = write_csv(tmp_path / "prompts.csv", ["prompt", "id"], ["one\ntwo\nthree", "1"], [" ", "2\n3"], ["x", "4"])
    with pytest.raises(ValueError, match=r'prompts\.csv, line 5, field "prompt": expected non-empty text'):
        load_prompts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,id\na,1\nb\n", r"line 3: 1 fields; expected 2 as in the header, \['prompt', 'id'\]"),
        ('prompt\nfine\n"never closed\nmore\n', r"line 3: not valid CSV: unexpected end of data"),
        ("prompt\n\"[{'role': 'user', 'content': 'hi'}]\"\n", r'line 2, field "prompt": .* not valid JSON'),
        ("question\na\n", r"line 2: the field \"prompt\" is missing, found \['question'\]"),
    ],
)
def test_a_broken_csv_file_is_an_error(tmp_path, content, message):
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.csv, " + message):
        load_prompts(tmp_path / "prompts.csv")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("start", ["[{", "[ {", "[\n {", " [\t{"])
def test_messages_in_a_csv_field_may_have_spaces_between_their_brackets(tmp_path, start):
    messages = json.dumps([USER]).replace("[{", start, 1)
    assert load_prompts(write_csv(tmp_path / "prompts.csv", ["prompt"], [messages])) == [[USER]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,id,prompt\na,1,b\n", "p.csv, line 1: the column 'prompt' comes twice in the header"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n',
            "p.jsonl, line 2: the name 'prompt' comes twice",
        ),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "p.json: the name 'prompt' comes twice in an object"),
    ],
)
def test_a_name_that_comes_twice_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_unnamed_columns_of_a_spreadsheet_are_ignored(tmp_path):
    assert load_prompts(write_csv(tmp_path / "p.csv", ["prompt", "", ""], ["a", "", ""])) == ["a"]


# ---- text that is none ----

HALF = "\ud83d"


@pytest.mark.parametrize(
    ("load", "row", "field"),
    [
        (load_prompts, {"prompt": f"ab{HALF}"}, "prompt"),
        (load_prompts, {"prompt": [{"role": "user", "content": f"ab{HALF}"}]}, "prompt"),
        (load_pairs, {"prompt": "p", "chosen": f"ab{HALF}", "rejected": "c"}, "chosen"),
        (load_pairs, {"prompt": "p", "chosen": "c", "rejected": [assistant(f"ab{HALF}")]}, "rejected"),
        (load_pairs, {"chosen": f"ab{HALF} c", "rejected": f"ab{HALF} d"}, "chosen"),
        (load_pairs, {"chosen": [USER, assistant("c")], "rejected": [USER, assistant(f"ab{HALF}")]}, "rejected"),
    ],
)
def test_half_of_a_surrogate_pair_is_an_error_with_line_and_field(tmp_path, load, row, field):
    path = write_jsonl(tmp_path / "data.jsonl", row)
    with pytest.raises(ValueError, match=rf'line 1, field "{field}": .*ud83d\' at character 3 is half of a surrogate'):
        load(path)


def test_an_error_that_shows_half_of_a_surrogate_pair_can_be_printed(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", {"prompt": {"text": HALF}})
    with pytest.raises(ValueError, match=r"got .*text") as error:
        load_prompts(path)
    assert str(error.value).encode()


# ---- rows that are left out ----


def test_rows_that_are_no_pair_are_skipped_and_counted_on_request(tmp_path, caplog):
    fine = {"prompt": "p", "chosen": "c", "rejected": "r"}
    wrong = [
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": "c", "rejected": " "},
        {"chosen": "ab", "rejected": "abc"},
        {"chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "c"},
        ["p", "c", "r"],
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", fine, *wrong, fine)
    assert load_pairs(path, skip_invalid=True) == [Preference("p", "c", "r")] * 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f'{path}: skipped, 6 of 8 rows are no pairs; the first: {path}, line 2: the fields "chosen" and "rejected" are '
        'equal: "c"'
    )


def test_prompts_are_skipped_likewise_and_a_damaged_line_stays_an_error(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": ""}, {"prompt": "a"}, {"prompt": [assistant("b")]})
    assert load_prompts(path, skip_invalid=True) == ["a"]
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_prompts(path, skip_invalid=True)


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(ValueError, match=r"p.jsonl: 2 of 2 rows are no prompts; the first: .* \"prompt\" is missing"):
        load_prompts(path, skip_invalid=True)


# ---- other files ----

ROWS = [{"prompt": "a"}, {"prompt": [SYSTEM, USER]}]


@pytest.mark.parametrize("name", ["p.json", "lines.json", "p.json.gz", "p.jsonl.gz", "p.csv.gz", "p.txt.gz"])
def test_the_same_prompts_from_files_of_every_kind(tmp_path, name):
    path, lines = tmp_path / name, "".join(json.dumps(row) + "\n" for row in ROWS)
    if "txt" in name or "csv" in name:
        content = "prompt\na\n" if "csv" in name else "a\n"
        expected = ["a"]
    else:
        content = lines if "lines" in name or "jsonl" in name else json.dumps(ROWS, indent=2)
        expected = ["a", [SYSTEM, USER]]
    with gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file:
        file.write(content)
    assert load_prompts(path) == expected


def test_a_parquet_file_holds_texts_and_conversations(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"chosen": [USER, assistant(text)], "rejected": [USER, assistant("Green.")]} for text in ("Blue.", "Red.")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_pairs(tmp_path / "p.parquet") == [Preference([USER], text, "Green.") for text in ("Blue.", "Red.")]
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r'p.parquet, row 2, field "prompt": .*got null'):
        load_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl.gz", b'{"prompt": "a"}\n', "p.jsonl.gz: cannot be decompressed: Not a gzipped file"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9],
            "p.jsonl.gz: cannot be decompressed: Compressed",
        ),
        (
            "p.json",
            b'[{"prompt": "a"},\n {"prompt": ]',
            "p.json: not valid JSON: Expecting value at line 2, character 13",
        ),
        ("p.json", b'[{"prompt": 5}]', 'p.json, row 1, field "prompt": .*got 5'),
        ("p.parquet", b"PAR1", "p.parquet: not a .parquet file that can be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_a_parquet_file_without_the_package_is_an_error_with_advice(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"p\.parquet: .*pip install pyarrow"):
        load_prompts(tmp_path / "p.parquet")


# ---- names ----


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "data/pairs.jsnl",
            r"data/pairs.jsnl: no such file or folder; did you mean data/pairs.jsonl\?; expected a file",
        ),
        (
            "data/other",
            r"data/other: no such .* \(data is a folder here, so this is taken for a path, not for a hub id\)",
        ),
        ("data/other:test", r"data/other: no such file or folder"),
        ("some/where/else", r"some/where/else: no such file or folder; expected a file named"),
        ("word", "word: no such file or folder; expected a file named"),
    ],
)
def test_a_name_that_is_no_file_is_an_error_before_a_hub_is_asked(tmp_path, monkeypatch, source, message):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "pairs.jsonl", {"prompt": "a"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=message):
        load_prompts(source)


# ---- datasets ----


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def conversations(count):
    return [
        {"chosen": [SYSTEM, USER, assistant(f"Blue {i}.")], "rejected": [SYSTEM, USER, assistant("Green.")], "id": i}
        for i in range(count)
    ]


def test_a_saved_dataset_gives_what_its_rows_hold(tmp_path, datasets):
    data = datasets.Dataset.from_list(conversations(3))
    data.with_format("torch", columns=["id"]).save_to_disk(tmp_path / "saved")
    expected = [Preference([SYSTEM, USER], f"Blue {i}.", "Green.") for i in range(3)]
    assert load_pairs(tmp_path / "saved") == expected
    assert load_prompts(str(tmp_path / "saved")) == [[SYSTEM, USER]] * 3
    with pytest.raises(ValueError, match=r"saved holds one dataset without splits"):
        load_prompts(f"{tmp_path / 'saved'}:train")


def test_a_saved_dataset_of_several_splits_needs_the_name_of_one(tmp_path, datasets):
    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert load_prompts(f"{tmp_path / 'saved'}:test") == ["test"]
    for split, message in (("", "no split is named"), (":dev", "no split 'dev'")):
        with pytest.raises(ValueError, match=rf"{message}; expected one of .*saved:train, .*saved:test"):
            load_prompts(f"{tmp_path / 'saved'}{split}")


def test_errors_in_a_dataset_count_rows_from_one(tmp_path, datasets):
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": None}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r'saved, row 2, field "prompt": .*got null'):
        load_prompts(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"row 1: the field \"chosen\" is missing, found \['prompt'\]"):
        load_pairs(tmp_path / "saved")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name.v1", ("owner/name.v1", "train")),
        ("owner/name:test", ("owner/name", "test")),
        ("owner/name:train[:1000]", ("owner/name", "train[:1000]")),
    ],
)
def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch, datasets, source, asked):
    calls = []

    def load_dataset(name, split):  # stands in for the network
        calls.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts(source) == ["a"]
    assert calls == [asked]


def test_a_dataset_without_the_package_is_an_error_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"owner/name: .*pip install 'r2m-kernels\[data\]'"):
        load_prompts("owner/name")


def test_a_source_that_is_nothing_known_is_an_error(tmp_path):
    (tmp_path / "prompts.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"prompts\.xlsx: expected a file named \*\.jsonl, \*\.json, \*\.csv, \*\.txt"):
        load_prompts(tmp_path / "prompts.xlsx")
    for name in ("prompts.jsonl", "prompts.json.gz", "prompts.csv", "prompts.txt", "prompts.parquet", "folder"):
        with pytest.raises(FileNotFoundError, match=name):
            load_prompts(tmp_path / name)
