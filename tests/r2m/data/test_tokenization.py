"""Token ids of prompts: special tokens once, the cache, and which prompts and pairs are dropped."""

import json
import logging
import random
import string

import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from r2m.data import tokenization
from r2m.data.sources import Preference
from r2m.data.tokenization import (
    encode_prompt,
    encode_prompts,
    encode_responses,
    encode_whole,
    response_texts,
    usable_pairs,
    usable_prompts,
    usable_whole_pairs,
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def adds_bos():
    """A tokenizer that begins every text with its bos token, as Llama's does."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that takes inputs of any size."""
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenization, "_CACHE_FROM", 0)
    return tmp_path / "cache" / "tokenized"


def random_prompts(count, seed=0):
    draw = random.Random(seed)
    texts = ["".join(draw.choices(string.printable + "äπ漢", k=draw.randint(1, 40))) for _ in range(count)]
    kinds = [lambda t: t, lambda t: "<s>" + t, lambda t: [SYSTEM, {"role": "user", "content": t}]]
    return [draw.choice(kinds)(text) for text in texts]


# ---- special tokens ----


def test_text_gets_the_bos_token_and_a_rendered_prompt_no_second_one(adds_bos):
    bos = adds_bos.bos_token_id
    assert encode_prompt(adds_bos, "hi")[0] == bos
    assert adds_bos.decode(encode_prompt(adds_bos, "hi")) == "<s>hi"
    rendered = adds_bos.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False)
    ids = encode_prompt(adds_bos, [SYSTEM, USER])
    assert encode_prompt(adds_bos, rendered) == ids
    assert encode_prompts(adds_bos, [rendered, [SYSTEM, USER]]) == [ids, ids]
    assert adds_bos.decode(ids) == "<s>system:Be brief.</s><s>user:hi</s><s>assistant:"


def test_many_prompts_encode_as_one_by_one(adds_bos, monkeypatch):
    prompts = random_prompts(100)
    expected = [encode_prompt(adds_bos, prompt) for prompt in prompts]
    assert encode_prompts(adds_bos, prompts) == expected
    monkeypatch.setattr(tokenization, "_BATCH", 3)
    assert encode_prompts(adds_bos, prompts) == expected
    assert encode_prompts(adds_bos, []) == []


@pytest.mark.parametrize("encode", [encode_prompt, lambda tokenizer, prompt: encode_prompts(tokenizer, [prompt])])
def test_messages_that_the_template_cannot_render_are_named(encode):
    refuses = tiny.tokenizer()
    refuses.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}hi"
    )
    assert encode(refuses, [USER])
    refuses.name_or_path = "models/refuses"
    message = (
        r'prompt \[\{"role": "system", .* the chat template of models/refuses cannot .* roles system, user: System'
    )
    with pytest.raises(ValueError, match=message):
        encode(refuses, [SYSTEM, USER])
    with pytest.raises(ValueError, match=r'prompt \[\{"role": "user", .*chat_template is not set'):
        encode(tiny.tokenizer(chat=False), [USER])


def test_of_many_prompts_the_one_that_the_template_refuses_is_named():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'tool' }}{% endfor %}"
    prompts = [[USER], [USER, {"role": "tool", "content": "42"}], [USER]]
    with pytest.raises(ValueError, match=r'prompt .*"tool", "content": "42"'):
        encode_prompts(tokenizer, prompts)


# ---- what a reward model reads, and what the assistant says ----


def test_a_whole_text_has_its_special_tokens_once(adds_bos):
    rendered = adds_bos.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False)
    texts = encode_whole(adds_bos, ["hi", rendered, [SYSTEM, USER]], [" you", "yes</s>", "yes"])
    assert adds_bos.batch_decode(texts) == ["<s>hi you", rendered + "yes</s>", rendered + "yes</s>"]
    assert texts[1] == texts[2]
    assert adds_bos.decode(encode_whole(adds_bos, ["a"], ["b"], suffix="!")[0]) == "<s>ab!"


def test_a_whole_text_keeps_the_token_that_the_tokenizer_adds_at_its_end(adds_bos):
    specials = [(token, adds_bos.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    texts = encode_whole(adds_bos, ["a", "<s>a"], ["b", "b"])
    assert adds_bos.batch_decode(texts) == ["<s>ab</s>"] * 2


@pytest.mark.parametrize("tag", ["<think>\n", "<think>", "<reasoning>\n\n", "<seed:think>"])
def test_what_the_template_opens_of_the_assistants_text_belongs_to_it(tokenizer, tag):
    tokenizer.chat_template += "{% if add_generation_prompt %}" + tag + "{% endif %}"
    prompts = [[USER], [SYSTEM, USER], "text <think>"]
    prompt_ids = encode_prompts(tokenizer, prompts)
    said = ["so</think>yes", "no", "so</think>yes"]
    sampled = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in said]
    texts = response_texts(tokenizer, prompts, prompt_ids, sampled)
    assert texts == [tag + said[0], tag + said[1], said[2]]
    # Back again, the tag is not doubled, however the data has it; a text without it is taken as it is.
    for given in (texts, [tag.strip() + said[0], said[1], said[2]]):
        ids = encode_responses(tokenizer, prompts, prompt_ids, given)
        assert ids == [tokenizer(text).input_ids for text in said]


def test_a_tag_that_is_a_special_token_is_no_text_and_one_in_a_message_opens_nothing(tokenizer):
    prompts = [[{"role": "user", "content": "write <think>"}]]
    assert response_texts(tokenizer, prompts, encode_prompts(tokenizer, prompts), [[5]]) == tokenizer.batch_decode(
        [[5]]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    prompt_ids = encode_prompts(tokenizer, prompts)
    assert prompt_ids[0][-1] == tokenizer.convert_tokens_to_ids("<think>")
    assert response_texts(tokenizer, prompts, prompt_ids, [[5]]) == tokenizer.batch_decode([[5]])


def test_of_whole_texts_those_are_usable_that_fit_with_suffix_and_template(tokenizer):
    chat, text = Preference([USER], "a", "bb"), Preference("ab", "c", "dd")
    length = max(map(len, encode_whole(tokenizer, [[USER]], ["bb"])))
    assert usable_whole_pairs(tokenizer, [chat, text], length, suffix="!") == [chat, text]
    assert usable_whole_pairs(tokenizer, [chat, text], length - 1, suffix="!") == [text]
    assert usable_whole_pairs(tokenizer, [text], 5, suffix="!") == [text]
    with pytest.raises(ValueError, match=r"pairs: none of 1 has .* at most 4 together"):
        usable_whole_pairs(tokenizer, [text], 4, suffix="!")


# ---- cache ----


def test_a_cache_hit_gives_the_ids_of_the_first_time(cache, adds_bos):
    prompts = random_prompts(50)
    first = encode_prompts(adds_bos, prompts)
    (file,) = cache.iterdir()
    assert encode_prompts(adds_bos, prompts) == first
    # It is the file that is read: other ids in it come back.
    arrays = load_file(file)
    arrays["ids"][0] += 1
    save_file(arrays, file)
    assert encode_prompts(adds_bos, prompts)[0][0] == first[0][0] + 1


def test_other_prompts_or_another_tokenizer_miss_the_cache(cache, tokenizer, adds_bos):
    prompts = random_prompts(10)
    encode_prompts(tokenizer, prompts)
    other_template = tiny.tokenizer(pad="</s>")
    other_template.chat_template = "{{ messages[-1]['content'] }}"
    for number, (other, texts) in enumerate(
        [(adds_bos, prompts), (other_template, prompts), (tokenizer, prompts[1:]), (tokenizer, prompts[::-1])], 2
    ):
        assert encode_prompts(other, texts) == [encode_prompt(other, prompt) for prompt in texts]
        assert len(list(cache.iterdir())) == number


def test_where_a_prompt_ends_is_part_of_the_key(cache, tokenizer):
    assert encode_prompts(tokenizer, ["ab", "c"]) != encode_prompts(tokenizer, ["a", "bc"])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "offsets", "no ids"])
def test_a_damaged_cache_file_is_made_anew(cache, tokenizer, caplog, damage):
    prompts = random_prompts(5)
    first = encode_prompts(tokenizer, prompts)
    (file,) = cache.iterdir()
    whole, arrays = file.read_bytes(), load_file(file)
    if damage == "offsets":
        arrays["offsets"][2] = arrays["offsets"][-1] + 5
        save_file(arrays, file)
    elif damage == "no ids":
        save_file({"offsets": arrays["offsets"]}, file)
    else:
        file.write_bytes(whole[:-10] if damage == "truncated" else b"")
    with caplog.at_level(logging.WARNING):
        assert encode_prompts(tokenizer, prompts) == first
    assert str(file) in caplog.text
    assert "tokenising anew" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, cache, tokenizer, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "file"))
    prompts = random_prompts(5)
    with caplog.at_level(logging.WARNING):
        assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]
    assert "token ids are not cached in" in caplog.text


def test_small_inputs_slow_tokenizers_and_dated_templates_are_not_cached(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path))
    encode_prompts(tokenizer, random_prompts(5))
    monkeypatch.setattr(tokenization, "_CACHE_FROM", 0)
    assert encode_prompts(ByT5Tokenizer(), ["a", "bc"]) == [[100, 1], [101, 102, 1]]
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
    encode_prompts(tokenizer, [[USER]])
    assert list(tmp_path.iterdir()) == []


# ---- what is usable ----


def test_empty_and_overlong_prompts_are_dropped_and_counted(tokenizer, caplog):
    prompts = ["abc", "", "abcd", [USER], "a"]
    with caplog.at_level(logging.WARNING):
        kept, ids = usable_prompts(tokenizer, prompts, 3)
    assert (kept, ids) == (["abc", "a"], [encode_prompt(tokenizer, "abc"), encode_prompt(tokenizer, "a")])
    assert caplog.messages == ["dropped 3 of 5 prompts: empty or longer than 3 tokens"]
    caplog.clear()
    assert usable_prompts(tokenizer, prompts[:1], 3)[0] == ["abc"]
    assert caplog.messages == []


def test_no_usable_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="prompts: none of 2 has between 1 and 3 tokens; expected at least 1"):
        usable_prompts(tokenizer, ["abcd", ""], 3)


def test_pairs_are_measured_with_both_completions(adds_bos, caplog):
    pairs = [
        Preference("ab", "c", "d"),  # 3 tokens with bos, and 1 each
        Preference("ab", "cc", "d"),
        Preference("ab", "c", "dd"),
        Preference("ab", "", "d"),
        Preference("<s>abc", "c", "d"),
        Preference("", "ccc", "ddd"),  # its prompt is the bos token
    ]
    with caplog.at_level(logging.WARNING):
        assert usable_pairs(adds_bos, pairs, 4) == [pairs[0], pairs[5]]
    assert caplog.messages == ["dropped 4 of 6 pairs: empty or longer than 4 tokens"]


def test_a_pair_without_prompt_tokens_is_dropped_and_none_left_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="pairs: none of 1 has prompt and completions of at least 1 token"):
        usable_pairs(tokenizer, [Preference("", "c", "d")], 4)


def test_a_chat_pair_counts_the_template(tokenizer):
    pair = Preference([SYSTEM, USER], "a", "b")
    length = len(encode_prompt(tokenizer, [SYSTEM, USER])) + 1
    assert usable_pairs(tokenizer, [pair], length) == [pair]
    with pytest.raises(ValueError, match=rf"at most {length - 1} together"):
        usable_pairs(tokenizer, [pair], length - 1)


def test_a_large_input_is_cached_by_default(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path))
    prompts = ["0123456789" * 1000] * 101
    assert len(json.dumps(prompts)) > tokenization._CACHE_FROM
    assert encode_prompts(tokenizer, prompts) == encode_prompts(tokenizer, prompts)
    (file,) = (tmp_path / "tokenized").iterdir()
    assert load_file(file)["offsets"].shape == (102,)
