"""Rows that are too many for memory: in a file without a name, each read when it is asked for."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Generic, TypeVar, overload

T = TypeVar("T")

IN_MEMORY = 256 << 20  # bytes of rows, as JSON, that stay in memory: some 60,000 pairs of 4,000 characters


class OnDisk(Sequence[T]):
    """The rows of a file, in any order; a slice, and what `picked` gives, are rows of the same file."""

    def __init__(self, file: IO[bytes], starts: array[int], make: Callable[..., T]):
        self.file, self.starts, self.make = file, starts, make  # starts: of the rows, in bytes

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> OnDisk[T]: ...
    def __getitem__(self, i: int | slice) -> T | OnDisk[T]:
        if isinstance(i, slice):
            return OnDisk(self.file, self.starts[i], self.make)
        self.file.seek(self.starts[i])
        return self.make(**json.loads(self.file.readline()))


def picked(rows: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """`rows` at these indices, where they are: in memory or on disk."""
    if isinstance(rows, OnDisk):
        return OnDisk(rows.file, array("q", (rows.starts[i] for i in indices)), rows.make)
    return [rows[i] for i in indices]


class Spool(Generic[T]):
    """Takes rows one by one, into memory, and into a file as soon as they are more than `IN_MEMORY`.

    make: the dataclass of the rows. Raises OSError where the file cannot be written.
    """

    def __init__(self, make: Callable[..., T]):
        self.make, self.rows = make, list[T]()
        self.file: IO[bytes] | None = None
        self.starts, self.end = array("q"), 0

    def __len__(self) -> int:
        return len(self.starts)

    def append(self, row: T) -> None:
        line = _line(row)
        self.starts.append(self.end)
        self.end += len(line)
        if self.file is None:
            self.rows.append(row)
        with _explained():
            if self.file is not None:
                self.file.write(line)
            elif self.end > IN_MEMORY:
                self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as its rows
                self.file.writelines(map(_line, self.rows))
                self.rows = []

    def sequence(self) -> Sequence[T]:
        """All rows, in the order in which they came."""
        if self.file is None:
            return self.rows
        with _explained():
            self.file.flush()
        return OnDisk(self.file, self.starts, self.make)


def _line(row: Any) -> bytes:
    return json.dumps(vars(row)).encode() + b"\n"  # `asdict` would copy every message


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"rows beyond {IN_MEMORY >> 20} MiB go to a file in {tempfile.gettempdir()}, which cannot be written: "
            f"{error}; expected free space there, or in the folder that TMPDIR names"
        ) from error
