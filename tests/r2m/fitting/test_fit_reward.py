"""From files of preference pairs to a folder that transformers, TRL and this package load."""

import json
import logging
import os
import random

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from r2m import Preference, R2MRewardModel, fit_reward
from r2m.cli import app
from r2m.commands.fit_reward import fit_reward_from_files, split_pairs
from r2m.devices import compute_dtype
from r2m.fitting import pairs as pairs_module
from r2m.fitting.bradley_terry import pair_accuracy, reliability
from r2m.fitting.pairs import embed_pairs, score_rollout, tokenize_pairs

WORDS = ["film", "story", "plot", "cast", "music", "ending", "scene", "joke"]
TEXTS = ["hello", "a longer text than the others!", "x"]


def preferences(count, seed=0, ends=("!", "?")):
    """Pairs of which the first end is preferred, but for a quarter of mistakes: a fit ends soon."""
    draw = random.Random(seed)
    pairs = []
    for i in range(count):
        good, bad = (f"{draw.choice(WORDS)} {i}{end}" for end in ends)
        chosen, rejected = (bad, good) if draw.random() < 0.25 else (good, bad)
        pairs.append(Preference(f"the {draw.choice(WORDS)} {i}: ", chosen, rejected))
    return pairs


def write(path, pairs):
    path.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in pairs))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embeddings"


@pytest.fixture
def pairs_file(tmp_path):
    return write(tmp_path / "pairs.jsonl", preferences(60))


@pytest.fixture
def policy_folder(tmp_path, policy, tokenizer):
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def fit(*arguments, **settings):
    return fit_reward_from_files(*arguments, **({"dtype": torch.float32} | settings))


def trl_scores(folder, texts, **tokenizing):
    """As TRL's GRPOTrainer scores with reward_funcs=folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="auto").eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", **tokenizing)
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def assert_equal_up_to_a_constant(scores, expected):
    torch.testing.assert_close(scores - scores.mean(), expected - expected.mean(), rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-2


# ---- the folder ----


@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardised"])
def test_the_folder_scores_alike_in_transformers_and_in_r2m(
    tmp_path, pairs_file, reward_checkpoint, policy_folder, policy, tokenizer, standardize
):
    held_out = preferences(12, seed=1)
    report = fit(
        pairs_file,
        reward_checkpoint,
        tmp_path / "out",
        policy=policy_folder,
        held_out=write(tmp_path / "held_out.jsonl", held_out),
        inner_width=8,
        floor=0.7,
        standardize=standardize,
    )
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    model = R2MRewardModel.from_pretrained(moved, policy=policy, dtype=torch.float32)
    assert (model.config.backbone, model.config.floor, model.config.standardize) == (str(moved), 0.7, standardize)
    rte = model.embed([""] * 3, TEXTS)
    assert_equal_up_to_a_constant(trl_scores(moved, TEXTS), model.vanilla_score(rte))

    rte, rollout = embed_pairs(model, held_out), tokenize_pairs(policy, tokenizer, held_out)
    assert report["accuracy_vanilla"] == pair_accuracy(model.vanilla_score(rte))
    assert report["accuracy_fused"] == pair_accuracy(score_rollout(model, policy, rte, rollout, 0.7))
    assert (report["training_pairs"], report["held_out_pairs"], report["dropped_pairs"]) == (60, 12, 0)
    assert json.loads((moved / "fit.json").read_text()) == report
    assert (moved / "calibration.png").is_file()


def test_without_a_policy_the_folder_is_a_classifier_only_and_a_start_for_r2m(
    tmp_path, pairs_file, reward_checkpoint, policy
):
    out = tmp_path / "out"
    report = fit(pairs_file, reward_checkpoint, out, max_epochs=20)
    assert "accuracy_fused" not in report
    assert not list(out.glob("r2m*"))
    assert "arXiv" not in (out / "README.md").read_text()
    model = R2MRewardModel.from_pretrained(out, policy=policy, dtype=torch.float32, inner_width=8)
    torch.testing.assert_close(model.vanilla_score(model.embed([""] * 3, TEXTS)), trl_scores(out, TEXTS))


def test_a_causal_lm_without_padding_token_becomes_a_classifier_that_reads_the_last_token(
    tmp_path, policy, policy_folder
):
    tiny.tokenizer(pad=None).save_pretrained(policy_folder)
    pairs = write(tmp_path / "pairs.jsonl", preferences(60, ends=(" was good!", " so bad")))
    fit(pairs, policy_folder, tmp_path / "out", policy=policy_folder, inner_width=8, suffix=" so:")
    model = R2MRewardModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.rte_token == "last"
    assert '" so:"' in (tmp_path / "out" / "README.md").read_text()
    scores = trl_scores(tmp_path / "out", [f"{text} so:" for text in TEXTS])
    assert_equal_up_to_a_constant(scores, model.vanilla_score(model.embed([""] * 3, TEXTS)))


def test_chats_that_end_in_the_padding_token_are_read_at_their_end(tmp_path, policy):
    """With rte_token="last" another padding token is written, or transformers would read one token earlier."""
    checkpoint = tiny.save_reward_checkpoint(tmp_path / "checkpoint", pad="</s>")
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    pairs = [Preference(chat, "yes!", "no?") for chat in chats] * 4
    fit(write(tmp_path / "p.jsonl", pairs), checkpoint, tmp_path / "out", rte_token="last")
    model = R2MRewardModel.from_pretrained(tmp_path / "out", policy=policy, dtype=torch.float32, rte_token="last")
    texts = [f"<s>user:{text}</s><s>assistant:yes</s>" for text in TEXTS]
    scores = trl_scores(tmp_path / "out", texts, add_special_tokens=False)
    assert_equal_up_to_a_constant(scores, model.vanilla_score(model.embed(chats, ["yes"] * 3)))


# ---- LoRA ----


def test_lora_lowers_the_held_out_loss_and_is_merged(tmp_path, reward_checkpoint, policy):
    """Which text is preferred depends on the prompt: a linear head on this random backbone hardly sees it."""
    draw = random.Random(0)
    pairs = []
    for _ in range(96):
        letter, other = draw.sample("ab", 2)
        completions = (letter * 3, other * 3) if draw.random() < 0.9 else (other * 3, letter * 3)
        pairs.append(Preference(f"{draw.choice(WORDS)} {letter}: ", *completions))
    training, held_out = write(tmp_path / "t.jsonl", pairs[:64]), write(tmp_path / "h.jsonl", pairs[64:])
    head = fit(training, reward_checkpoint, tmp_path / "head", held_out=held_out)
    settings = {"lora_rank": 4, "learning_rate": 1e-2, "batch_size": 32}
    lora = fit(training, reward_checkpoint, tmp_path / "lora", held_out=held_out, **settings)
    assert lora["lora_steps"] > 0
    assert lora["loss_vanilla"] < head["loss_vanilla"] - 0.1
    assert lora["accuracy_vanilla"] > head["accuracy_vanilla"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "head", tmp_path / "lora"))
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "_proj" in name or name == "score.weight"}
    model = R2MRewardModel.from_pretrained(tmp_path / "lora", policy=policy, dtype=torch.float32)
    assert pair_accuracy(model.vanilla_score(embed_pairs(model, pairs[64:]))) == lora["accuracy_vanilla"]
    assert model.vanilla_score(embed_pairs(model, pairs[:64])).std().item() == pytest.approx(1, abs=1e-3)


def test_lora_needs_a_backbone_that_can_be_written(reward_checkpoint, policy):
    model = tiny.reward_model(reward_checkpoint, policy, offload=True)
    with pytest.raises(ValueError, match="lora_rank is 2; expected 0 for a backbone that is quantised or offloaded"):
        fit_reward(model, preferences(4), preferences(4), lora_rank=2)


# ---- many pairs ----


def test_hidden_states_beyond_the_budget_are_made_anew_and_fitted_alike(
    reward_checkpoint, policy, tokenizer, monkeypatch
):
    monkeypatch.setattr(pairs_module, "STATISTICS_PAIRS", 20)
    reports, shapes = [], []
    score = R2MRewardModel.score

    def counted(model, rte, hidden, **keywords):
        shapes.append(len(rte))
        return score(model, rte, hidden, **keywords)

    monkeypatch.setattr(R2MRewardModel, "score", counted)
    for budget in (1 << 30, 0):
        model = tiny.reward_model(reward_checkpoint, policy, standardize=True)
        torch.manual_seed(0)
        shapes.clear()
        reports.append(
            fit_reward(
                model,
                preferences(40, ends=(" was good!", " so bad")),
                preferences(16, seed=1, ends=(" was good!", " so bad")),
                policy=policy,
                tokenizer=tokenizer,
                batch_size=8,
                hidden_budget=budget,
            )
        )
        assert set(shapes) == ({80, 32} if budget else {16})
    kept, streamed = reports
    assert streamed["warm_start_steps"] > 0
    assert streamed["accuracy_vanilla"] == kept["accuracy_vanilla"]
    assert streamed["loss_fused"] == pytest.approx(kept["loss_fused"], abs=0.05)


@pytest.fixture
def embedded(monkeypatch):
    """Texts that went through a backbone."""
    texts = []
    run = R2MRewardModel.run_backbone

    def counted(model, rows):
        texts.extend(rows)
        return run(model, rows)

    monkeypatch.setattr(R2MRewardModel, "run_backbone", counted)
    return texts


def test_embeddings_are_computed_once(reward_checkpoint, policy, embedded, cache):
    pairs = preferences(7)
    first = embed_pairs(tiny.reward_model(reward_checkpoint, policy), pairs, batch_size=3, cache=True)
    again = embed_pairs(tiny.reward_model(reward_checkpoint, policy), pairs, batch_size=3, cache=True)
    assert len(embedded) == 14
    assert torch.equal(first, again)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    torch.testing.assert_close(first, embed_pairs(tiny.reward_model(reward_checkpoint, policy), pairs))


@pytest.mark.parametrize("change", ["suffix", "rte_token", "dtype", "max_length", "weights", "texts"])
def test_embeddings_of_another_backbone_or_text_are_not_taken(tmp_path, policy, embedded, change):
    checkpoint = tiny.save_reward_checkpoint(tmp_path / "checkpoint")
    pairs = preferences(4)
    embed_pairs(tiny.reward_model(checkpoint, policy), pairs, cache=True)
    settings = {"suffix": ".", "rte_token": "last", "dtype": torch.float64, "max_length": 5}
    if change == "weights":
        tiny.save_reward_checkpoint(checkpoint, seed=2)
        os.utime(checkpoint / "model.safetensors", ns=(0, 0))
    if change == "texts":
        pairs = preferences(4, seed=1)
    model = tiny.reward_model(checkpoint, policy, **{name: v for name, v in settings.items() if name == change})
    rte = embed_pairs(model, pairs, cache=True)
    assert len(embedded) == 16
    torch.testing.assert_close(rte, embed_pairs(model, pairs))


def test_an_interrupted_run_goes_on_where_it_stopped(reward_checkpoint, policy, embedded, monkeypatch):
    monkeypatch.setattr(pairs_module, "TEXTS_AT_ONCE", 4)
    model, pairs = tiny.reward_model(reward_checkpoint, policy), preferences(6)
    encode, calls = model.encode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_pairs(model, pairs, cache=True)
    assert len(embedded) == 8
    rte = embed_pairs(model, pairs, cache=True)
    assert len(embedded) == 12
    torch.testing.assert_close(rte, embed_pairs(model, pairs))


def test_a_damaged_file_of_embeddings_is_made_anew(reward_checkpoint, policy, cache, caplog):
    model, pairs = tiny.reward_model(reward_checkpoint, policy), preferences(4)
    expected = embed_pairs(model, pairs, cache=True)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(embed_pairs(model, pairs, cache=True), expected)
    assert f"{file} is damaged and made anew" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_an_error(reward_checkpoint, policy, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=r"cannot write embeddings to .*cache.embeddings \(R2M_CACHE moves it\)"):
        embed_pairs(tiny.reward_model(reward_checkpoint, policy), preferences(2), cache=True)


# ---- the split and the measures ----


@pytest.mark.parametrize("per_prompt", [1, 3, 50])
def test_a_tenth_is_held_out_and_prompts_stay_together_where_they_can(per_prompt):
    pairs = [Preference(f"prompt {i // per_prompt}", f"a{i}", f"b{i}") for i in range(100)]
    training, held_out = split_pairs(pairs, 0, 10)
    assert sorted(p.chosen for p in training + held_out) == sorted(p.chosen for p in pairs)
    assert 8 <= len(held_out) <= 10
    if per_prompt == 3:
        assert not {p.prompt for p in training} & {p.prompt for p in held_out}
    assert split_pairs(pairs, 0, 10) == (training, held_out)
    assert split_pairs(pairs, 1, 10) != (training, held_out)


def test_reliability_counts_confidence_against_what_came_true():
    certain, even = 20.0, 0.0
    margins = torch.tensor([certain, certain, certain, -certain, even])
    assert reliability(margins) == [(0.5, 0.0, 1), (1.0, 0.75, 4)]


# ---- the command ----


def command(*arguments):
    return CliRunner().invoke(app, ["fit-reward", *map(str, arguments)])


def test_the_command_fits_reports_and_takes_names_of_columns(tmp_path, reward_checkpoint, policy_folder, caplog):
    rows = [{"question": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences(40)]
    rows.append({"question": "long " * 30, "chosen": "a", "rejected": "b"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--pairs", tmp_path / "pairs.jsonl", "--columns", "prompt=question", "--max-length", 100]
    options += ["--reward-model", reward_checkpoint, "--policy", policy_folder, "--inner-width", 8]
    options += ["--positions", "response", "--max-epochs", 200, "--tolerance", 0.01]
    caplog.set_level(logging.WARNING)
    result = command(*options, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for line in ("training_pairs: 36", "held_out_pairs: 4", "dropped_pairs: 1", "accuracy_vanilla: ", "loss_fused: "):
        assert line in result.stdout
    assert "dropped 1 of 41 pairs" in caplog.text
    assert "positions: response" in result.stdout
    assert load_file(tmp_path / "out" / "model.safetensors")["score.weight"].dtype == compute_dtype("cpu")
    assert R2MRewardModel.from_pretrained(tmp_path / "out").config.max_length == 100


MISTAKES = {
    "few pairs": ("--pairs few.jsonl", "few.jsonl has 9 that can be used, of which a tenth is held out"),
    "no such file": ("--held-out none.jsonl", "none.jsonl"),
    "columns without =": ("--columns prompt", "--columns prompt: expected field=name"),
    "an unknown column": ("--columns prompt=question", "question"),
    "an unknown token": ("--rte-token first", "rte_token is 'first'; expected 'checkpoint' or 'last'"),
    "settings of the cross-attention alone": ("--standardize", "standardize is given without a policy"),
    "a folder with other files": ("--output full", "output full is not empty; expected a new folder"),
    "an earlier fit": ("--output saved", "output saved is not empty; expected a new folder"),
    "a head that is not there": (
        "--reward-model wide --policy wide --keep-head",
        "keep_head is True, and reward_model wide is a language model without a head; expected a sequence-classif",
    ),
    "a head that alone is kept": ("--keep-head", "keep_head is True without a policy"),
    "other positions": ("--policy wide --positions prompt", "positions is 'prompt'; expected 'all' or 'response'"),
    "a file for a folder": ("--output few.jsonl", "output few.jsonl cannot be written"),
    "the reward model's folder": ("--output reward", "output reward "),
    "settings of a saved model": (
        "--reward-model saved --floor 0.5",
        "floor is 0.5; the R2M reward model saved has 0.6",
    ),
    "a policy of another width": ("--reward-model saved --policy wide", "the policy given has width 48"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_model(tmp_path, reward_checkpoint, policy, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", preferences(12))
    write(tmp_path / "few.jsonl", preferences(9))
    (tmp_path / "reward").symlink_to(reward_checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("another model")
    tiny.reward_model(reward_checkpoint, policy).save_pretrained(tmp_path / "saved")
    tiny.policy(48, num_hidden_layers=1).save_pretrained(tmp_path / "wide")
    options, message = MISTAKES[name]
    given = {"--pairs": "pairs.jsonl", "--reward-model": "reward", "--output": "out"}
    words = iter(options.split())
    for word in words:
        given[word] = None if word in ("--standardize", "--keep-head") else next(words)
    if name == "settings of a saved model":
        given["--policy"] = "wide"
    result = command(*(word for item in given.items() for word in item if word is not None))
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "model.safetensors").read_text() == "another model"


@pytest.mark.parametrize("moment", ["fit_reward", "save"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_an_interrupted_fit_leaves_the_folder_as_it_was(
    tmp_path, pairs_file, reward_checkpoint, monkeypatch, moment, there
):
    def interrupted(model, *arguments, **options):
        raise KeyboardInterrupt

    def interrupted_while_writing(model, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    if moment == "fit_reward":
        monkeypatch.setattr("r2m.commands.fit_reward.fit_reward", interrupted)
    else:
        monkeypatch.setattr("r2m.commands.fit_reward.fit_reward", lambda *_, **options: {})
        monkeypatch.setattr(R2MRewardModel, "save_classifier", interrupted_while_writing)
    folder = tmp_path / "new" / "out"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        fit(pairs_file, reward_checkpoint, folder)
    assert (tmp_path / "new").exists() == there
    assert not list(tmp_path.glob("new/out/*"))


def test_weights_that_are_not_finite_stop_the_fit(tmp_path, pairs_file, reward_checkpoint):
    broken = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(reward_checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(reward_checkpoint).save_pretrained(broken)
    with pytest.raises(FloatingPointError, match="Bradley-Terry fit of the head: the held-out loss is nan"):
        fit(pairs_file, broken, tmp_path / "out")
