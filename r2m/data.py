"""Prompts and preference pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prompt = str | list[dict[str, Any]]  # plain text, or chat messages: [{"role": ..., "content": ...}, ...]


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, of which `chosen` is preferred."""

    prompt: Prompt
    chosen: str
    rejected: str


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read the prompts of a `.jsonl` file (the field "prompt" of each line: text or chat messages) or of a `.txt` file
    (a prompt a line). Blank lines are skipped. Raises ValueError naming file, line and field."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: expected a file named *.jsonl or *.txt")
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no prompts, the file is empty")
    if path.suffix == ".txt":
        return [line.rstrip("\r") for _, line in lines]
    return [_parse_prompt(line, where=f"{path}, line {n}") for n, line in lines]


def _parse_prompt(line: str, *, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object with the field "prompt", got {_shown(row)}')
    if "prompt" not in row:
        raise ValueError(f'{where}: the field "prompt" is missing, found {sorted(row)}')
    prompt = row["prompt"]
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise ValueError(
        f'{where}, field "prompt": expected non-empty text or a list of messages {{"role": "...", "content": "..."}}, '
        f"got {_shown(prompt)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
