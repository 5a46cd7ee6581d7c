"""Which sources have passed a gate in full, and with which compiler or packages: judged.json, which is committed.

What is on record is done in part, or not at all: what changes no kernel need not wait for a thousand compilations, or
for as many interpreted launches. `--full` makes them all the same.
"""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMITTED = Path(__file__).with_name("judged.json")


def fingerprint(sources: Iterable[Path], compiler: str) -> str:
    """Of the files' names and contents, and of what compiles or runs them."""
    found = sorted({path for path in sources if path.is_file()})
    parts = [f"{path.relative_to(ROOT)} {sha256(path.read_bytes()).hexdigest()}" for path in found]
    return sha256("\n".join([compiler, *parts]).encode()).hexdigest()


def is_judged(gate: str, found: str, file: Path = COMMITTED) -> bool:
    return file.exists() and json.loads(file.read_text()).get(gate) == found


def write(gate: str, found: str, file: Path = COMMITTED) -> None:
    """After a full run without problems."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {gate: found}, indent=2, sort_keys=True) + "\n")
