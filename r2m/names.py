"""Whether what a config or a command names is there: before torch is loaded, and before any hub is asked."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # end the names of architectures without a scoring head


def check_name(name: str | Path, expected: str, *, is_hub_id: bool = True) -> None:
    """Raises FileNotFoundError for a name that looks like a path where nothing is.

    It does if a hub id has another form, if the folder is there in which it would lie, or if something of nearly its
    name lies there. expected: what to say was expected. is_hub_id: whether the hub may have such a name.
    """
    path = Path(name)
    if path.exists():
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.8)
    of_hub = is_hub_id and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name))
    if of_hub and not near and ("/" not in str(name) or not path.parent.is_dir()):
        return
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    if of_hub and not near:
        hint = f" ({path.parent} is a folder here, so this is taken for a path, not for a hub id)"
    raise FileNotFoundError(f"{name}: no such file or folder{hint}; expected {expected}")


def check_model(name: str | Path) -> None:
    """Raises FileNotFoundError for a model whose name looks like a path where no folder is."""
    expected = "the folder of a model, or a hub id, owner/name"
    if Path(name).is_file():
        raise FileNotFoundError(f"{name} is a file; expected {expected}")
    check_name(name, expected)


def check_scores(name: str | Path) -> None:
    """Raises ValueError for the folder of a causal LM, which has no scoring head. Others are checked once loaded."""
    config = Path(name) / "config.json"
    if not config.is_file() or (Path(name) / "r2m_config.json").is_file():
        return
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    if architectures and all(architecture.endswith(_LANGUAGE_MODELS) for architecture in architectures):
        raise ValueError(no_head(f"{name} is a {architectures[0]}"))


def no_head(what: str) -> str:
    return (
        f"{what}, whose scoring head would be random; fit one on preference pairs first: r2m fit-reward --pairs FILE "
        "--reward-model MODEL --output FOLDER, and take that folder"
    )


def named(key: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """What `load(name, **options)` returns, None for "". Its ValueError, OSError or ImportError names key and name."""
    if not name:
        return None
    try:
        return load(name, **options)
    except (ValueError, OSError, ImportError) as error:
        if str(error).startswith(key):
            raise
        kind = next(kind for kind in (ValueError, OSError, ImportError) if isinstance(error, kind))
        raise kind(f"{key}: {error}" if name in str(error) else f"{key}: {name}: {error}") from error
