"""Texts and token ids: what the policy reads and says, what a reward model reads, and which of it is short enough.

Ids of many prompts are cached on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress, groupby, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from r2m.data.sources import Preference, Prompt, check_list
from r2m.data.spool import picked
from r2m.models import cache_dir

logger = logging.getLogger(__name__)

# Texts tokenised in one call: fast tokenizers share them among threads, and their records of spans and offsets,
# about 100 bytes a token, are dropped after each call.
_BATCH = 1024

# Bytes of JSON below which prompts are not cached. The cache's key needs the tokenizer as a string: 20 ms for SmolLM2's
# 49,000 tokens, 0.4 s for a vocabulary of 256,000, whatever the number of prompts. On 2 cores a million bytes are
# tokenised in 0.3 s.
_CACHE_FROM = 1_000_000

# Chat templates fail in their own words (TemplateError), in transformers' (ValueError), or on an unexpected type.
_REFUSALS = (TemplateError, ValueError, TypeError)

# A tag that opens the reasoning, at the end of a prompt, and tokens that it takes at most.
_REASONING, _TAG_TOKENS = re.compile(r"<[\w:]*(?:think|thought|reason)[\w:]*>\s*\Z"), 16


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: chat messages through the chat template with the assistant's turn opened, text as it is.

    Special tokens come in once: a text that begins with the beginning-of-sequence token, as a rendered chat does, gets
    no more of them. Raises ValueError, naming the prompt's beginning and roles, if the tokenizer has no chat template
    or the template refuses the messages.
    """
    return _encode(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of `encode_prompt` for many prompts, in their order.

    Those of large inputs and a fast tokenizer are kept in `tokenized` in the cache directory (`R2M_CACHE`) and read
    from there the next time. A cache that cannot be read or written costs a warning and the time.
    """
    check_list("prompts", prompts, "load_prompts")
    path = _cache_file(tokenizer, prompts)
    if path is None:
        return _encode(tokenizer, prompts)
    rows = _read(path, len(prompts))
    if rows is None:
        rows = _encode(tokenizer, prompts)
        _write(path, rows)
    return rows


def response_texts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
) -> list[str]:
    """What the assistant says in each of B sequences: the response without special tokens, behind what the chat
    template has opened of it at the prompt's end, such as "<think>"."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        _opened(tokenizer, prompt, ids) + text for prompt, ids, text in zip(prompts, prompt_ids, texts, strict=True)
    ]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    texts: Sequence[str],
) -> list[list[int]]:
    """Token ids of B texts of the assistant as the policy samples them: tokenised by themselves, without special
    tokens, and without what the chat template has opened already."""
    said = [
        _without_beginning(text, _opened(tokenizer, prompt, ids))
        for prompt, ids, text in zip(prompts, prompt_ids, texts, strict=True)
    ]
    return list(_encode_texts(tokenizer, said, add_special_tokens=False))


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[str], *, suffix: str = ""
) -> list[list[int]]:
    """Token ids of B prompts with their completions, as a reward model reads them.

    Chat messages go through the chat template with the completion as the assistant's turn. A text prompt is continued
    by completion and `suffix` as they are, with the special tokens that the tokenizer adds; one that begins with the
    beginning-of-sequence token gets no second one. Raises ValueError as `encode_prompt` does.
    """
    rows: list[list[int]] = []
    for is_text, run in groupby(zip(prompts, completions, strict=True), lambda pair: isinstance(pair[0], str)):
        if is_text:
            texts = [f"{prompt}{completion}{suffix}" for prompt, completion in run]
            encoded = _encode_texts(tokenizer, texts, add_special_tokens=True)
            rows += [_bos_once(tokenizer, text, ids) for text, ids in zip(texts, encoded, strict=True)]
        else:
            chats = [[*prompt, {"role": "assistant", "content": completion}] for prompt, completion in run]
            rows += _encode_chats(tokenizer, chats, add_generation_prompt=False)
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


def usable_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], max_tokens: int
) -> Sequence[Preference]:
    """The pairs of which the policy reads at most `max_tokens` tokens, prompt + chosen as well as prompt + rejected,
    and of prompt, chosen and rejected at least 1 each; a warning counts the others.

    Completions are those of `encode_responses`. Raises ValueError if no pair is left.
    """
    check_list("pairs", pairs, "load_pairs")

    def fit(some: Sequence[Preference]) -> list[bool]:
        prompts = [pair.prompt for pair in some]
        prompt_ids = encode_prompts(tokenizer, prompts)
        chosen, rejected = (
            encode_responses(tokenizer, prompts, prompt_ids, texts)
            for texts in ([pair.chosen for pair in some], [pair.rejected for pair in some])
        )
        lengths = [tuple(map(len, ids)) for ids in zip(prompt_ids, chosen, rejected, strict=True)]
        return [min(p, c, r) > 0 and p + max(c, r) <= max_tokens for p, c, r in lengths]

    return _usable_pairs(pairs, fit, max_tokens)


def usable_whole_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], max_tokens: int, *, suffix: str = ""
) -> Sequence[Preference]:
    """The same for a reward model, which reads either text as `encode_whole` gives it."""

    def fit(some: Sequence[Preference]) -> list[bool]:
        prompts = [pair.prompt for pair in some]
        chosen, rejected = (
            encode_whole(tokenizer, prompts, texts, suffix=suffix)
            for texts in ([pair.chosen for pair in some], [pair.rejected for pair in some])
        )
        return [0 < len(c) <= max_tokens and 0 < len(r) <= max_tokens for c, r in zip(chosen, rejected, strict=True)]

    return _usable_pairs(pairs, fit, max_tokens)


def _usable_pairs(
    pairs: Sequence[Preference], fit: Callable[[Sequence[Preference]], list[bool]], max_tokens: int
) -> Sequence[Preference]:
    # A batch at a time: the tokens of all pairs take several times the memory of their texts.
    kept: list[int] = []
    for start in range(0, len(pairs), _BATCH):
        batch = list(pairs[start : start + _BATCH])
        kept += compress(range(start, start + len(batch)), fit(batch))
    if not kept:
        raise ValueError(
            f"pairs: none of {len(pairs)} has prompt and completions of at least 1 token each and at most {max_tokens} "
            "together; expected at least 1"
        )
    _warn_of_dropped("pairs", len(pairs) - len(kept), len(pairs), max_tokens)
    return picked(pairs, kept)


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
            rows += _encode_chats(tokenizer, list(run), add_generation_prompt=True)
    return rows


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool
) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        yield from tokenizer(texts[start : start + _BATCH], add_special_tokens=add_special_tokens).input_ids


def _encode_chats(tokenizer: Any, chats: Sequence[Prompt], *, add_generation_prompt: bool) -> Iterator[list[int]]:
    def encode(some: Sequence[Prompt]) -> list[list[int]]:
        return tokenizer.apply_chat_template(
            some, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )

    for start in range(0, len(chats), _BATCH):
        batch = chats[start : start + _BATCH]
        try:
            rows = encode(batch)
        except _REFUSALS:
            for chat in batch:
                try:
                    encode([chat])
                except _REFUSALS as error:
                    raise _refused(tokenizer, chat, error) from None
            raise
        yield from rows


def _refused(tokenizer: Any, chat: Any, error: Exception) -> ValueError:
    roles = ", ".join(str(message["role"]) for message in chat)
    return ValueError(
        f"prompt {json.dumps(chat, ensure_ascii=False)[:80]}: the chat template of "
        f"{tokenizer.name_or_path or 'the tokenizer'} cannot render messages of the roles {roles}: {error}; expected "
        "messages that it can render, prompts of text, or another chat_template in the tokenizer"
    )


def _lacks_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """An unfinished text that begins with the beginning-of-sequence token has all of them."""
    return not tokenizer.bos_token or not text.startswith(tokenizer.bos_token)


def _bos_once(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """A whole text keeps what the tokenizer adds at its end."""
    is_doubled = not _lacks_special_tokens(tokenizer, text) and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if is_doubled else ids


def _opened(tokenizer: Any, prompt: Prompt, ids: list[int]) -> str:
    """What the template has opened of the assistant's text behind messages, "" for none. Special tokens, which decoding
    drops from the response too, are no text."""
    if isinstance(prompt, str):
        return ""
    found = _REASONING.search(tokenizer.decode(ids[-_TAG_TOKENS:]))
    return "" if found is None or found[0].strip() in tokenizer.all_special_tokens else found[0]


def _without_beginning(text: str, beginning: str) -> str:
    exact = text.startswith(beginning)
    return text.removeprefix(beginning if exact else beginning.strip())


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
