import pytest
import tiny
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

from r2m.batching import Tokens
from r2m.config import Generation, Lora
from r2m.method.hidden_states import HiddenStateTap
from r2m.policy.load import add_adapter
from r2m.policy.loss import token_log_probs
from r2m.policy.passes import response_logits
from r2m.policy.rollout import collate, micro_batches, sample


def forward(policy, rollout):
    return policy(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=rollout.position_ids,
        logits_to_keep=rollout.completion_mask.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]


def test_layout_masks_and_positions_come_from_lengths():
    r = collate(["a", "b"], ["", ""], [[5, 6, 7], [8]], [[9, 1], [10, 11, 12]], pad_id=1)
    assert r.input_ids.tolist() == [[5, 6, 7, 9, 1, 1], [1, 1, 8, 10, 11, 12]]
    assert r.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert r.completion_mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert r.feedback_mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert [row[m].tolist() for row, m in zip(r.position_ids, r.attention_mask, strict=True)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
    ]
    assert r.completion_ids.tolist() == [[9, 1, 1], [10, 11, 12]]


def test_response_only_feedback_leaves_the_prompt_out():
    r = collate(["a", "b"], ["", ""], [[5, 6], [8]], [[9, 1], [10, 11, 12]], pad_id=1, positions="response")
    assert r.feedback_mask.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("prompts", "completions", "name"), [([[1], []], [[2], [2]], "prompt"), ([[1], [1]], [[2], []], "completion")]
)
def test_an_empty_row_is_named(prompts, completions, name):
    with pytest.raises(ValueError, match=f"{name} 1 has no tokens"):
        collate(["a", "b"], ["", ""], prompts, completions, pad_id=0)


def test_the_checkpoints_own_sampling_defaults_do_not_leak_in(policy, tokenizer):
    """With top_k = 1 of the checkpoint in force, all K responses would be the same."""
    policy.generation_config.top_k = 1
    policy.generation_config.repetition_penalty = 5.0
    policy.generation_config.suppress_tokens = list(range(2, 200))
    policy.generation_config.min_p = 0.9
    before = policy.generation_config.to_dict()
    torch.manual_seed(0)
    r = sample(policy, tokenizer, ["hello"], 6, Generation(max_new_tokens=8))
    assert len({tuple(row) for row in r.completion_ids.tolist()}) == 6
    assert policy.generation_config.to_dict() == before


def test_greedy_decoding_takes_the_most_likely_token_whatever_the_checkpoints_defaults(policy, tokenizer):
    policy.generation_config.repetition_penalty = 5.0
    policy.generation_config.suppress_tokens = list(range(2, 200))
    policy.generation_config.do_sample = True
    before = policy.generation_config.to_dict()
    settings = Generation(max_new_tokens=6, temperature=0.3)
    r = sample(policy, tokenizer, ["hello there", "x"], 1, settings, greedy=True)
    assert policy.generation_config.to_dict() == before
    for i, prompt in enumerate(["hello there", "x"]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(6):
            ids = torch.cat([ids, policy(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert r.input_ids[i][r.attention_mask[i]].tolist() == ids[0].tolist()


def test_generation_and_scoring_agree_on_the_log_probs(policy, tokenizer, monkeypatch):
    """Left padding, positions, temperature and cache: the logits that were sampled from are those the update sees."""
    steps, generate = [], policy.generate

    def recording_generate(**kwargs):
        output = generate(**kwargs, output_scores=True, return_dict_in_generate=True)
        steps.extend(output.scores)
        return output.sequences

    monkeypatch.setattr(policy, "generate", recording_generate)
    torch.manual_seed(0)
    with torch.no_grad():
        r = sample(policy, tokenizer, ["hello there", "x"], 3, Generation(max_new_tokens=7, temperature=0.7))
        sampled = torch.stack(steps, 1).log_softmax(-1).gather(-1, r.completion_ids[..., None])[..., 0]
        scored = token_log_probs(forward(policy, r), r.completion_ids, 0.7)
    torch.testing.assert_close(sampled[r.completion_mask], scored[r.completion_mask], rtol=1e-4, atol=1e-4)


def test_a_response_ends_at_its_first_end_token_also_when_padding_is_the_same_token(policy, tokenizer):
    torch.manual_seed(0)
    ends = list(range(2, 40))  # many, so that some responses end early
    r = sample(policy, tokenizer, ["hello"], 16, Generation(max_new_tokens=12, eos_token_ids=[1, *ends]))
    lengths = r.completion_mask.sum(-1).tolist()
    assert len(set(lengths)) > 1
    for ids, length, finished in zip(r.completion_ids.tolist(), lengths, r.finished.tolist(), strict=True):
        assert not any(token in (1, *ends) for token in ids[: length - 1])
        assert finished == (ids[length - 1] in (1, *ends))
        assert finished or length == 12


def test_a_stop_string_ends_a_response_and_padding_after_it_is_no_part_of_it(policy, tokenizer):
    torch.manual_seed(0)
    stops = list("abcdefghijklmnop")
    r = sample(policy, tokenizer, ["hello"], 16, Generation(max_new_tokens=12, stop_strings=stops))
    assert r.finished.any()
    for i in range(16):
        text = tokenizer.decode(r.completion_ids[i][r.completion_mask[i]])
        assert not any(stop in text[:-1] for stop in stops)
        if r.finished[i]:
            assert text[-1] in stops or text.endswith("</s>")


def test_generation_runs_in_eval_mode_and_restores_the_mode(tokenizer):
    policy = tiny.policy().train()
    modes = []
    policy.model.register_forward_hook(lambda module, args, output: modes.append(module.training))
    sample(policy, tokenizer, ["a"], 2, Generation(max_new_tokens=2))
    assert policy.training
    assert not any(modes)


def test_a_function_can_take_over(policy, tokenizer):
    r = sample(policy, tokenizer, ["a", "b"], 2, Generation(), generator=lambda ids, k: [[7, 1], [7, 8, 9], [7], [1]])
    assert r.prompts == ["a", "a", "b", "b"]
    assert r.finished.tolist() == [True, False, False, True]


def test_a_function_that_returns_too_few_is_an_error(policy, tokenizer):
    with pytest.raises(ValueError, match="generator returned 3 responses; expected 2 prompts x 2"):
        sample(policy, tokenizer, ["a", "b"], 2, Generation(), generator=lambda ids, k: [[7]] * 3)


# ---- prompts are read once ----

PROMPTS = ["hello there, this is a longer one", "x", "two words"]  # the second is a single token


def build(architecture):
    shared = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shared |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    if architecture == "adapter":
        return add_adapter(tiny.policy(), Lora(rank=2))
    if architecture == "sliding window":
        return MistralForCausalLM(MistralConfig(**shared, sliding_window=6)).eval()
    if architecture == "convolutions":
        return Lfm2ForCausalLM(Lfm2Config(**shared, layer_types=["conv", "full_attention"])).eval()
    return tiny.policy_with_dropout(architecture).eval()


def reads(policy, run):
    """What `run` returns, and (sequences, columns) of every forward pass of the policy."""
    shapes = []
    hook = policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    result = run()
    hook.remove()
    return result, shapes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [*tiny.DROPOUT_ARCHITECTURES, "sliding window", "adapter"])
def test_reading_each_prompt_once_samples_the_same_tokens(tokenizer, monkeypatch, architecture, attention):
    policy = build(architecture)
    policy.set_attn_implementation(attention)

    def run():
        torch.manual_seed(0)
        return sample(policy, tokenizer, PROMPTS, 4, Generation(max_new_tokens=8))

    once, shapes = reads(policy, run)
    assert shapes[0] == (3, len(PROMPTS[0]) - 1)
    assert set(shapes[1:]) == {(12, 1)}
    monkeypatch.setattr("r2m.policy.generate._REPEATABLE_LAYERS", set())
    plain, shapes = reads(policy, run)
    assert shapes[1] == (12, len(PROMPTS[0]))
    assert torch.equal(once.input_ids, plain.input_ids)
    assert len({tuple(row) for row in once.completion_ids.tolist()}) > 6


def test_a_model_that_keeps_more_than_keys_and_values_reads_every_sequence(tokenizer):
    policy = build("convolutions")
    torch.manual_seed(0)
    r, shapes = reads(policy, lambda: sample(policy, tokenizer, PROMPTS[:1], 3, Generation(max_new_tokens=4)))
    assert shapes[1] == (3, len(PROMPTS[0]))
    assert len({tuple(row) for row in r.completion_ids.tolist()}) == 3


def test_prompts_of_one_token_have_nothing_to_read_ahead(policy, tokenizer):
    r, shapes = reads(policy, lambda: sample(policy, tokenizer, ["x", "y"], 3, Generation(max_new_tokens=4)))
    assert set(shapes) == {(6, 1)}
    assert r.prompts == ["x"] * 3 + ["y"] * 3


@pytest.mark.parametrize(
    ("size", "chunks"),
    [(None, [12]), (100, [12]), (12, [12]), (11, [8, 4]), (4, [4, 4, 4]), (3, [3, 1, 3, 1, 3, 1]), (1, [1] * 12)],
)
def test_no_more_sequences_than_asked_for_are_generated_at_once(policy, tokenizer, monkeypatch, size, chunks):
    seen, generate = [], policy.generate
    monkeypatch.setattr(
        policy, "generate", lambda **kwargs: seen.append(len(kwargs["input_ids"])) or generate(**kwargs)
    )
    torch.manual_seed(0)
    r = sample(policy, tokenizer, PROMPTS, 4, Generation(max_new_tokens=5, batch_size=size))
    assert seen == chunks
    assert r.prompts == [prompt for prompt in PROMPTS for _ in range(4)]
    prompt_ids = [
        row[mask][: len(p)].tolist() for row, mask, p in zip(r.input_ids, r.attention_mask, r.prompts, strict=True)
    ]
    assert prompt_ids == [tokenizer(prompt).input_ids for prompt in r.prompts]
    assert len({tuple(row) for row in r.completion_ids.tolist()}) > 6


def test_prompts_are_not_tokenized_again_where_their_ids_are_given(policy, tokenizer):
    r = sample(policy, tokenizer, ["a", "b"], 2, Generation(max_new_tokens=2), prompt_ids=[[70, 71], [72]])
    assert r.prompts == ["a", "a", "b", "b"]
    assert [row[mask][:-2].tolist() for row, mask in zip(r.input_ids, r.attention_mask, strict=True)] == [
        [70, 71], [70, 71], [72], [72],
    ]  # fmt: skip


# ---- parts: the sequences of a pass ----


@pytest.fixture
def ragged():
    """Ten sequences whose prompts and responses differ in length, in groups of two."""
    generator = torch.Generator().manual_seed(0)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(50, 260, (length,), generator=generator).tolist()

    prompts = [ids for ids in [tokens(1, 20) for _ in range(5)] for _ in range(2)]
    return collate([""] * 10, [""] * 10, prompts, [tokens(1, 16) for _ in range(10)], pad_id=1)


def test_a_part_is_as_wide_as_its_longest_sequence():
    r = collate(["a"] * 3, [""] * 3, [[5, 6, 7], [8], [9]], [[10], [11, 12, 13], [14]], pad_id=1)
    part = r.part([1, 0])
    assert part.input_ids.tolist() == [[8, 11, 12, 13], [5, 6, 7, 10]]
    assert part.attention_mask.all()
    assert part.feedback_mask.int().tolist() == [[1, 1, 1, 0]] * 2
    assert part.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert part.to_rollout(torch.tensor([[1.0, 2, 3], [4, 5, 6]])).tolist() == [[1, 2, 3], [6, 0, 0]]
    r = collate(["a"] * 3, [""] * 3, [[5, 6, 7], [5, 6, 7], [9]], [[10], [11, 12, 13], [14]], pad_id=1)
    assert r.part([0, 1]).input_ids.tolist() == [[1, 1, 5, 6, 7, 10], [5, 6, 7, 11, 12, 13]]
    part = r.part([2, 0])
    assert part.attention_mask.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert part.feedback_mask.int().tolist() == [[0, 0, 1, 0], [1, 1, 1, 0]]
    assert part.position_ids[part.attention_mask].tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("size", [3, Tokens(40)], ids=["sequences", "tokens"])
@pytest.mark.parametrize("group", [1, 2])
def test_parts_give_the_log_probs_hidden_states_and_gradients_of_the_padded_round(policy, ragged, size, group):
    hidden = {}
    weight = torch.rand(ragged.completion_mask.shape)
    with HiddenStateTap(policy, lambda states, _: hidden.update(padded=states)):
        expected = token_log_probs(forward(policy, ragged), ragged.completion_ids, 0.7) * ragged.completion_mask
    gradients = torch.autograd.grad((expected * weight).sum(), list(policy.parameters()))

    def check(rows, states, mask):
        of_padded = hidden["padded"][rows][ragged.feedback_mask[rows]]
        torch.testing.assert_close(states[mask], of_padded, rtol=1e-5, atol=1e-5)

    found = micro_batches(ragged, size, group=group)
    parts = [part for micro_batch in found for part in micro_batch]
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(10))
    assert sum(part.input_ids.numel() for part in parts) < 0.85 * ragged.input_ids.numel()
    for micro_batch in found:
        log_probs = [
            part.to_rollout(token_log_probs(response_logits(policy, part, check), part.response_ids, 0.7))
            for part in micro_batch
        ]
        rows = torch.cat([part.rows for part in micro_batch])
        values = torch.cat(log_probs)
        torch.testing.assert_close(values, expected[rows], rtol=1e-5, atol=1e-5)
        (values * weight[rows]).sum().backward()
    for p, gradient in zip(policy.parameters(), gradients, strict=True):
        # A sum over all tokens rounds at the size of its terms, not at its own.
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_prompts_generated_in_sorted_batches_keep_their_responses(policy, tokenizer):
    """Greedy responses, whose prompt decides them."""
    prompts = ["a", "what is it? ", "hello ", "to"]
    settings = Generation(max_new_tokens=4, eos_token_ids=[], batch_size=4)
    alone = [sample(policy, tokenizer, [p], 2, settings, greedy=True).completion_ids for p in prompts]
    together = sample(policy, tokenizer, prompts, 2, settings, greedy=True).completion_ids
    assert together.tolist() == torch.cat(alone).tolist()
    assert len(together.unique(dim=0)) > 1
