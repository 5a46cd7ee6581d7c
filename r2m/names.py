"""Whether what a config or a command names is there: before torch is loaded, and before any hub is asked.

Functions that it names are loaded here, too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("prompt", "chosen", "rejected")  # of a row of data
TEXT_FORMATS = (".jsonl", ".json", ".csv", ".txt")
SUFFIXES = "*.jsonl, *.json, *.csv, *.txt (or one of these and .gz) or *.parquet"

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # end the names of architectures without a scoring head


def check_name(name: str | Path, expected: str, *, is_hub_id: bool = True) -> None:
    """Raises FileNotFoundError for a name that looks like a path where nothing is.

    A name looks like a path if a hub id has another form, if its folder is there, or if that folder has something of
    nearly its name. expected: what to say was expected. is_hub_id: whether the hub may have such a name.
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


def data_format(path: Path) -> str:
    """The suffix that says how a file is read: of a compressed one that before `.gz`."""
    inner = Path(path.stem).suffix
    return inner if path.suffix == ".gz" and inner in TEXT_FORMATS else path.suffix


def check_columns(name: str, columns: Mapping[str, str]) -> None:
    """Raises ValueError for a field that neither prompts nor pairs have. name: of the argument or key."""
    for field in columns:
        if field not in FIELDS:
            raise ValueError(f"{name}: unknown field {field!r}; expected {', '.join(map(repr, FIELDS))}")


def check_source(source: str | Path, *, pairs: bool = False) -> None:
    """Raises ValueError or FileNotFoundError for a source of `load_prompts`, with `pairs` of `load_pairs`, that is not
    there or of another kind. Reads no file, and asks no hub."""
    path = Path(source)
    has_format = data_format(path) in (*TEXT_FORMATS, ".parquet")
    if pairs and data_format(path) == ".txt":
        raise ValueError(f"{source}: a .txt file holds prompts only; expected pairs in a *.jsonl or *.csv file")
    if path.is_file() and not has_format:
        raise ValueError(f"{path}: expected a file named {SUFFIXES}")
    if has_format:
        check_name(path, "a file that is there", is_hub_id=False)
    elif not path.is_dir():
        check_name(
            (name := str(source).partition(":")[0]),
            f"a file named {SUFFIXES}, a folder written by Dataset.save_to_disk, or a dataset of the Hugging Face hub "
            "as owner/name",
            is_hub_id="/" in name,
        )


def check_function(what: str, name: str) -> None:
    """Raises what `load_function` does for a name of another form, and for a file or module that is not there; runs
    nothing of it."""
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(f"{what} is {name!r}; expected 'module:function' or 'file.py:function'")
    if source.endswith(".py") and not Path(source).is_file():
        raise ValueError(f"{what} is {name!r}; there is no file {source}")
    module = source.partition(".")[0]
    if not source.endswith(".py") and module not in sys.modules and importlib.util.find_spec(module) is None:
        raise ImportError(f"{what} is {name!r}; {source} cannot be imported: there is no module {module}")


def load_function(what: str, name: str) -> Callable[..., Any]:
    """The function that "module:function" or "folder/file.py:function" names; errors say `what` it is for.

    Raises ValueError if the name has another form or is no function, ImportError if the module cannot be imported.
    """
    check_function(what, name)
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        spec: Any = importlib.util.spec_from_file_location(f"r2m_{what}_{Path(source).stem}", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where its dataclasses, for one, look it up
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ImportError(f"{what} is {name!r}; {source} cannot be imported: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{what} is {name!r}; {source} has no function {function}")
    return found


QUEUE = "queue"  # the labeller that is a person


def is_function(name: str) -> bool:
    """Whether a labeller's name has the form "module:function" or "file.py:function"; else it is a command."""
    return re.fullmatch(r"(.+\.py|[\w.]+):\w+", name) is not None


def check_labeller(name: str) -> None:
    """Raises ValueError or ImportError for a function that `check_function` refuses, and for a command whose program is
    not there; runs nothing of it."""
    if name == QUEUE:
        return
    if is_function(name):
        check_function("labeller", name)
        return
    try:
        program = next(iter(shlex.split(name)), "")
    except ValueError as error:  # a quote that does not end
        raise ValueError(f"labeller is {name!r}; it is no command: {error}") from None
    if shutil.which(program) is None:
        raise ValueError(
            f"labeller is {name!r}; there is no program {program!r}: expected 'module:function', 'file.py:function', "
            f"a command, or {QUEUE!r}"
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
