"""Token ids of prompts, cached on disk, and which prompts and pairs are short enough."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from r2m.data import Preference, Prompt
from r2m.models import cache_dir

logger = logging.getLogger(__name__)

# Texts tokenised in one call: fast tokenizers share them among threads, and their records of spans and offsets,
# about 100 bytes a token, are dropped after each call.
_BATCH = 1024

# Bytes of JSON below which prompts are not cached. The cache's key needs the tokenizer as a string: 20 ms for SmolLM2's
# 49,000 tokens, 0.4 s for a vocabulary of 256,000, whatever the number of prompts. On 2 cores a million bytes are
# tokenised in 0.3 s.
_CACHE_FROM = 1_000_000


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: chat messages through the chat template with the assistant's turn opened, text as it is.

    Special tokens come in once: a text that begins with the beginning-of-sequence token, as a rendered chat does, gets
    no more of them. Raises ValueError, naming the prompt's beginning, if the tokenizer has no chat template or the
    template refuses the messages.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt, add_special_tokens=_lacks_special_tokens(tokenizer, prompt)).input_ids
    try:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (ValueError, TemplateError) as error:
        shown = json.dumps(prompt, ensure_ascii=False)
        raise ValueError(f"prompt {shown[:80]}: the chat template cannot render it: {error}") from None
    return cast(list[int], ids)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of `encode_prompt` for many prompts, in their order.

    Those of large inputs and a fast tokenizer are kept in `tokenized` in the cache directory (`R2M_CACHE`) and read
    from there the next time. A cache that cannot be read or written costs a warning and the time.
    """
    path = _cache_file(tokenizer, prompts)
    if path is None:
        return _encode(tokenizer, prompts)
    rows = _read(path, len(prompts))
    if rows is None:
        rows = _encode(tokenizer, prompts)
        _write(path, rows)
    return rows


def usable_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts of 1 to `max_tokens` tokens, and their ids; a warning counts the others.

    Raises ValueError if none is left.
    """
    kept = [
        (prompt, ids)
        for prompt, ids in zip(prompts, encode_prompts(tokenizer, prompts), strict=True)
        if 0 < len(ids) <= max_tokens
    ]
    if not kept:
        raise ValueError(f"prompts: none of {len(prompts)} has between 1 and {max_tokens} tokens; expected at least 1")
    _warn_of_dropped("prompts", len(prompts) - len(kept), len(prompts), max_tokens)
    return [prompt for prompt, _ in kept], [ids for _, ids in kept]


def usable_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], max_tokens: int) -> list[Preference]:
    """The pairs of which prompt + chosen and prompt + rejected both have at most `max_tokens` tokens, and prompt,
    chosen and rejected at least 1 each; a warning counts the others.

    Completions are tokenised by themselves, without special tokens. Raises ValueError if no pair is left.
    """
    prompts, chosen, rejected = (
        map(len, encode_prompts(tokenizer, [pair.prompt for pair in pairs])),
        map(len, _encode_texts(tokenizer, [pair.chosen for pair in pairs], add_special_tokens=False)),
        map(len, _encode_texts(tokenizer, [pair.rejected for pair in pairs], add_special_tokens=False)),
    )
    kept = [
        pair
        for pair, p, c, r in zip(pairs, prompts, chosen, rejected, strict=True)
        if min(p, c, r) > 0 and p + max(c, r) <= max_tokens
    ]
    if not kept:
        raise ValueError(
            f"pairs: none of {len(pairs)} has prompt and completions of at least 1 token each and at most {max_tokens} "
            "together; expected at least 1"
        )
    _warn_of_dropped("pairs", len(pairs) - len(kept), len(pairs), max_tokens)
    return kept


def _warn_of_dropped(kind: str, dropped: int, total: int, max_tokens: int) -> None:
    if dropped:
        logger.warning("dropped %d of %d %s: empty or longer than %d tokens", dropped, total, kind, max_tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    def kind(prompt: Prompt) -> tuple[bool, bool]:
        return isinstance(prompt, str), isinstance(prompt, str) and _lacks_special_tokens(tokenizer, prompt)

    rows: list[list[int]] = []
    for (is_text, lacks_special_tokens), run in groupby(prompts, kind):
        if is_text:
            rows += _encode_texts(tokenizer, cast(list[str], list(run)), add_special_tokens=lacks_special_tokens)
        else:
            rows += _encode_chats(tokenizer, list(run))
    return rows


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool
) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        yield from tokenizer(texts[start : start + _BATCH], add_special_tokens=add_special_tokens).input_ids


def _encode_chats(tokenizer: Any, chats: list[Prompt]) -> Iterator[list[int]]:
    for start in range(0, len(chats), _BATCH):
        batch = chats[start : start + _BATCH]
        try:
            rows = tokenizer.apply_chat_template(batch, add_generation_prompt=True, tokenize=True, return_dict=False)
        except (ValueError, TemplateError):
            for chat in batch:
                encode_prompt(tokenizer, chat)  # raises, naming the prompt
            raise
        yield from rows


def _lacks_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return not tokenizer.bos_token or not text.startswith(tokenizer.bos_token)


# ---- the cache: all ids in one row, and where each prompt's begin ----


def _cache_file(tokenizer: Any, prompts: Sequence[Prompt]) -> Path | None:
    """Named by all that the ids depend on; None where that cannot be told or the prompts are few."""
    digest, size = hashlib.sha256(), 0
    for prompt in prompts:
        line = json.dumps(prompt).encode() + b"\n"
        digest.update(line)
        size += len(line)
    template = json.dumps(tokenizer.chat_template)  # text, several by name, or null
    depends_on_date = "strftime_now" in template
    if size < _CACHE_FROM or not tokenizer.is_fast or depends_on_date:
        return None
    settings = [transformers.__version__, template, tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    digest.update(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return cache_dir() / "tokenized" / f"{digest.hexdigest()}.safetensors"


def _read(path: Path, count: int) -> list[list[int]] | None:
    try:
        arrays = load_file(path)
        ids, offsets = arrays["ids"], arrays["offsets"]
        if len(offsets) != count + 1 or offsets[-1] != len(ids) or (np.diff(offsets, prepend=0) < 0).any():
            raise ValueError("its offsets do not fit its ids")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("cached token ids in %s cannot be read, tokenising anew: %s", path, error)
        return None
    flat = ids.tolist()
    return [flat[start:end] for start, end in pairwise(offsets.tolist())]


def _write(path: Path, rows: list[list[int]]) -> None:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)  # [N + 1]
    ids = np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1])  # [total]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            finished = Path(scratch) / path.name
            save_file({"ids": ids, "offsets": offsets}, finished)
            os.replace(finished, path)
    except (OSError, SafetensorError) as error:
        logger.warning("token ids are not cached in %s (R2M_CACHE moves it): %s", path.parent, error)
