"""Prompts and preference pairs, from files, saved datasets and the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from r2m.data.spool import Spool
from r2m.names import FIELDS, check_columns, check_source, data_format

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]  # plain text, or chat messages: [{"role": ..., "content": ...}, ...]

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, of which `chosen` is preferred."""

    prompt: Prompt
    chosen: str
    rejected: str


def load_prompts(
    source: str | Path, *, columns: Mapping[str, str] | None = None, skip_invalid: bool = False
) -> list[Prompt]:
    """The prompts of a file, a saved dataset, or a dataset of the Hugging Face hub.

    source: a `.jsonl` file, a `.json` file with a list of objects, a `.csv` file with a header line, a `.txt` file (a
        prompt a line), each of them also compressed (`.jsonl.gz`), a `.parquet` file, a folder written by
        `Dataset.save_to_disk`, or `owner/name` on the hub. A dataset's split follows a colon: `owner/name:test` (by
        default "train"), on the hub also a slice, `owner/name:train[:1000]`. Blank lines of a file are skipped.
    columns: field -> its name in the data, such as {"prompt": "question"}. The fields are "prompt", and of pairs
        "chosen" and "rejected"; all other columns are ignored.
    skip_invalid: leave out rows that are no prompt, with a warning that counts them. A file that is damaged, such as
        one with a line that is no JSON, stays an error.

    A prompt is text or chat messages; in a CSV file messages are JSON. Of preference pairs the prompt is taken (see
    `load_pairs`).

    Raises ValueError, which names source, line (or row, counted from 1) and field, for data that is no prompt, for text
    that UTF-8 cannot hold (half of a surrogate pair), and for a name that comes twice in a header or an object;
    FileNotFoundError for a source that does not exist; ImportError for a dataset without the package `datasets` or a
    `.parquet` file without `pyarrow`.
    """
    prompts = list[Prompt]()
    _load(source, columns, "prompts", _parse_prompt, skip_invalid, prompts)
    return prompts


def load_pairs(
    source: str | Path, *, columns: Mapping[str, str] | None = None, skip_invalid: bool = False
) -> Sequence[Preference]:
    """The preference pairs of a source of `load_prompts`, with its errors; a `.txt` file holds none.

    A pair has the fields "prompt", "chosen" and "rejected". Without "prompt" it is implicit, as in TRL: of two texts
    the prompt is the longest common beginning, less a space at its end; of two conversations it is all but the last
    message. That holds also for a prompt of text beside two conversations. A completion is text, or messages that are
    the prompt's (where implicit) and then one of the assistant's, whose content is taken.

    Pairs beyond `r2m.data.spool.IN_MEMORY` bytes stay on disk, in a file without a name, and are read one by one.

    Raises ValueError also for completions that are equal or empty, and for an implicit pair that shares no prompt;
    `skip_invalid` leaves such pairs out. Raises OSError where the file without a name cannot be written.
    """
    check_source(source, pairs=True)
    pairs = Spool(Preference)
    _load(source, columns, "pairs", _parse_pair, skip_invalid, pairs)
    return pairs.sequence()


def check_list(name: str, value: object, loader: str | None = None) -> None:
    """Raises TypeError for text or a path in place of a list, and for one conversation in place of a list of prompts.

    Text would be read letter by letter. loader: the function of `r2m` that makes such a list of a file.
    """
    if isinstance(value, str | os.PathLike):
        hint = f", such as r2m.{loader}({str(value)[:80]!r})" if loader else ""
        raise TypeError(f"{name} is the {type(value).__name__} {str(value)[:80]!r}; expected a list{hint}")
    if loader == "load_prompts" and isinstance(value, list) and value and isinstance(value[0], dict):
        raise TypeError(f"{name} is a list of messages, which is one prompt; expected a list of prompts")


def _load(
    source: str | Path,
    columns: Mapping[str, str] | None,
    kind: str,
    parse: Callable[[dict[str, Any], dict[str, str], str], _Item],
    skip_invalid: bool,
    items: list[_Item] | Spool[_Item],
) -> None:
    """Appends what the rows of `source` are to `items`."""
    columns = columns or {}
    check_columns("columns", columns)
    check_source(source)
    names = {field: columns.get(field, field) for field in FIELDS}

    def parsed(row: Any, where: str) -> _Item:
        if not isinstance(row, dict):
            first = names["prompt" if kind == "prompts" else "chosen"]
            raise ValueError(f'{where}: expected an object with the field "{first}", got {_shown(row)}')
        # One config names the columns of prompts and pairs: a file of prompts need not have those of pairs.
        if kind == "pairs" or names["prompt"] not in row:
            for column in columns.values():
                _require(row, column, where)
        if data_format(Path(source)) == ".csv":
            row |= {name: _csv_value(row[name], name, where) for name in names.values() if name in row}
        return parse(row, names, where)

    skipped = list[ValueError]()
    for where, row in _rows(source):
        try:
            items.append(parsed(row, where))
        except ValueError as error:
            if not skip_invalid:
                raise
            skipped.append(error)
    if skipped:
        count = f"{len(skipped)} of {len(items) + len(skipped)} rows are no {kind}; the first: {skipped[0]}"
        if not len(items):
            raise ValueError(f"{source}: {count}")
        logger.warning("%s: skipped, %s", source, count)
    if not len(items):
        raise ValueError(f"{source}: no {kind}, the {'file' if Path(source).is_file() else 'dataset'} is empty")


# ---- sources: each gives (where, row) ----


def _rows(source: str | Path) -> Iterable[tuple[str, Any]]:
    path = Path(source)
    if not path.is_file():
        return _dataset_rows(str(source))
    return _parquet_rows(path) if path.suffix == ".parquet" else _file_rows(path)


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a line of text or JSON, which may hold any other separator. A byte order mark is no content.
    form = data_format(path)
    newline = "" if form == ".csv" else "\n"
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
        try:
            for where, row in _READERS[form](file, path):
                yield f"{path}, {where}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: cannot be decompressed: {error}") from None


def _read_jsonl(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", _json(line, f"{path}, line {number}")


def _read_json(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects; a file of anything else is taken for lines of JSON, which often have this name too."""
    text = file.read()
    if text.lstrip().startswith("["):
        for number, row in enumerate(_json(text, str(path)), 1):
            yield f"row {number}", row
    else:
        yield from _read_jsonl(io.StringIO(text), path)


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"{where}: the name {_doubled([name for name, _ in pairs])!r} comes twice in an object")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {_explain(error)}") from None


def _doubled(names: list[str]) -> str | None:
    """The first name that has come before; an unnamed column has none."""
    return next((name for i, name in enumerate(names) if name and name in names[:i]), None)


def _read_txt(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", {"prompt": line.rstrip("\r\n")}


def _read_csv(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                if doubled := _doubled(header):
                    raise ValueError(f"{path}, line {start}: the column {doubled!r} comes twice in the header")
            elif fields:
                if len(fields) != len(header):
                    raise ValueError(
                        f"{path}, line {start}: {len(fields)} fields; expected {len(header)} as in the header, {header}"
                    )
                yield f"line {start}", dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not valid CSV: {error}") from None


def _explain(error: json.JSONDecodeError) -> str:
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return f"{error.msg} at {line}character {error.colno}"


_READERS: dict[str, Callable[[TextIO, Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_txt,
}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path}: reading a .parquet file needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            if doubled := _doubled(file.schema_arrow.names):
                raise ValueError(f"{path}: the column {doubled!r} comes twice")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as error:
        raise ValueError(f"{path}: not a .parquet file that can be read: {error}") from None


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    on_disk = Path(name).is_dir()
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: reading a dataset needs datasets: pip install 'r2m-kernels[data]'") from error
    data: Any
    if not on_disk:
        data = datasets.load_dataset(name, split=split or "train")
    else:
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                given = f"no split {split!r}" if split else "no split is named"
                raise ValueError(f"{source}: {given}; expected one of {', '.join(f'{name}:{s}' for s in data)}")
            data = data[split]
        elif split:
            raise ValueError(f"{source}: {name} holds one dataset without splits; expected {name}")
    # A saved dataset keeps its format, which may hide columns or turn them into tensors.
    for number, row in enumerate(data.with_format(None), 1):
        yield f"{source}, row {number}", row


# ---- rows ----


def _csv_value(text: str, name: str, where: str) -> Any:
    """Messages where a field looks like them, else its text."""
    if not re.match(r"\s*\[\s*\{", text):
        return text
    return _json(text, f'{where}, field "{name}": starts like a list of messages')


def _parse_prompt(row: dict[str, Any], names: dict[str, str], where: str) -> Prompt:
    if _is_implicit(row, names):
        return _shared_prompt(row, names, where)
    return _checked_prompt(_require(row, names["prompt"], where), names["prompt"], where)


def _parse_pair(row: dict[str, Any], names: dict[str, str], where: str) -> Preference:
    chosen, rejected = (_require(row, names[field], where) for field in ("chosen", "rejected"))
    if _is_implicit(row, names):
        prompt = _shared_prompt(row, names, where)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = _checked_prompt(row[names["prompt"]], names["prompt"], where)
    chosen = _completion(chosen, names["chosen"], where)
    rejected = _completion(rejected, names["rejected"], where)
    if chosen == rejected:
        raise _no_preference(row, names, where)
    return Preference(prompt, chosen, rejected)


def _is_implicit(row: dict[str, Any], names: dict[str, str]) -> bool:
    prompt, chosen, rejected = (names[field] for field in FIELDS)
    if chosen not in row or rejected not in row:
        return False
    # Some datasets repeat the user's text as "prompt" beside whole conversations.
    return prompt not in row or (isinstance(row[prompt], str) and isinstance(row[chosen], list))


def _shared_prompt(row: dict[str, Any], names: dict[str, str], where: str) -> Prompt:
    chosen, rejected = row[names["chosen"]], row[names["rejected"]]
    if isinstance(chosen, str) and isinstance(rejected, str):
        for field in ("chosen", "rejected"):
            _check_text(row[names[field]], names[field], where)
        if chosen == rejected:
            raise _no_preference(row, names, where)
        shorter = min(len(chosen), len(rejected))
        length = bisect_left(range(shorter), True, key=lambda i: chosen[: i + 1] != rejected[: i + 1])
        # A tokenizer joins a space to the word after it, so the space goes to the completions.
        if chosen[:length].endswith(" "):
            length -= 1
        if chosen[:length].strip():
            return chosen[:length]
    else:
        for field in ("chosen", "rejected"):
            _check_messages(row[names[field]], names[field], where)
        if len(chosen) > 1 and chosen[:-1] == rejected[:-1]:
            return _checked_prompt(chosen[:-1], names["chosen"], where)
    raise ValueError(
        f'{where}: the fields "{names["chosen"]}" and "{names["rejected"]}" share no prompt; expected two texts with '
        "the same beginning, or the same messages and then one of the assistant"
    )


def _checked_prompt(value: object, name: str, where: str) -> Prompt:
    if isinstance(value, str) and value.strip():
        _check_text(value, name, where)
        return value
    messages = _check_messages(value, name, where)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f'{where}, field "{name}": the prompt ends with the assistant\'s turn, which is to be sampled')
    if not messages[-1]["content"].strip():
        raise ValueError(f'{where}, field "{name}": the prompt\'s last message is empty')
    return messages


def _completion(value: object, name: str, where: str) -> str:
    text = value
    if isinstance(value, list) and value:
        messages = _check_messages(value, name, where)
        text = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "assistant" else None
    if isinstance(text, str) and text.strip():
        _check_text(text, name, where)
        return text
    raise ValueError(
        f'{where}, field "{name}": expected non-empty text or one message of the assistant after the prompt, '
        f"got {_shown(value)}"
    )


def _check_messages(value: object, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise ValueError(
            f'{where}, field "{name}": expected non-empty text or a list of messages {{"role": "...", "content": '
            f'"..."}}, got {_shown(value)}'
        )
    for message in value:
        if not isinstance(message["content"], str):
            raise ValueError(
                f'{where}, field "{name}": expected text as the content of a message (images and other parts are not '
                f"supported), got {_shown(message['content'])}"
            )
        _check_text(message["content"], name, where)
    return value


def _check_text(text: str, name: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where}, field "{name}": {text[error.start]!a} at character {error.start + 1} is half of a surrogate '
            "pair; expected text that UTF-8 can hold"
        ) from None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _require(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(
            f'{where}: the field "{name}" is missing, found {sorted(row)}; where it has another name, columns says '
            "which, such as prompt=question"
        )
    return row[name]


def _no_preference(row: dict[str, Any], names: dict[str, str], where: str) -> ValueError:
    chosen, rejected = names["chosen"], names["rejected"]
    return ValueError(f'{where}: the fields "{chosen}" and "{rejected}" are equal: {_shown(row[chosen])}')


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
