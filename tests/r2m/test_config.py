import copy
import pickle
from dataclasses import replace

import pytest
import yaml

from r2m.batching import Tokens
from r2m.config import KL, R2M, Lora, R2MConfig, config_to_yaml, load_config


def test_a_file_and_overrides_make_a_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "policy: some/model\nlearning_rate: 1e-6\nr2m:\n  floor: 0.7\ngeneration: {stop_strings: ['###']}\n"
    )
    config = load_config(file, ["r2m.alpha=0.5", "rounds=7", "lora.rank=4", "generation.eos_token_ids=[1, 2]"])
    assert (config.policy, config.learning_rate, config.rounds) == ("some/model", 1e-6, 7)
    assert (config.r2m.floor, config.r2m.alpha, config.lora.rank) == (0.7, 0.5, 4)
    assert (config.generation.stop_strings, config.generation.eos_token_ids) == (["###"], [1, 2])


def test_what_a_run_writes_reads_back_equal(tmp_path):
    config = load_config(None, ["lora.top_layers=2", "kl.beta=0.01", "trackers=[wandb]", "evaluation.stop_at_kl=3"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("flor=1", r"unknown key 'flor'; did you mean 'r2m.floor'\?"),
        ("r2m.flor=1", r"unknown key 'r2m.flor'; did you mean 'r2m.floor'\?"),
        ("generation.temprature=1", r"did you mean 'generation.temperature'"),
        ("stop_at_kl=1", r"unknown key 'stop_at_kl'; did you mean 'evaluation.stop_at_kl'\?"),
        ("keep=1", r"unknown key 'keep'; did you mean 'checkpoints.keep'\?"),
        ("evaluation.evry=1", r"unknown key 'evaluation.evry'; did you mean 'evaluation.every'\?"),
        ("checkpoints.every_round=1", r"unknown key .*; did you mean 'checkpoints.every'\?"),
        ("evaluate_every=1", "unknown key 'evaluate_every'; did you mean 'evaluation.every'"),
        ("placement.offload=true", "unknown key 'placement.offload'; did you mean 'placement.offload_re"),
        ("offload_reference=true", r"did you mean 'placement.offload_reference'\?"),
        ("zzzz=1", "unknown key 'zzzz'; known keys: policy"),
        ("rounds=many", r"rounds: .*integer.*given 'many'"),
        ("r2m.feedback=on", "r2m.feedback: .*'none', 'frozen', 'trained' or 'head'"),
        ("r2m.source=none", "r2m.source: .*'policy', 'reference' or 'noise'"),
        ("algorithm=ppo", r"algorithm: .*'rloo', 'grpo', 'remax' or 'reinforce\+\+'"),
        ("algorithm=reinforce++", r"kl.placement is 'loss'; reinforce\+\+ has its KL .* expected 'reward'"),
        ("num_generations=1", r"num_generations is 1; .* compared by rloo and GREBT: expected at least 2"),
        ("num_generations=0", "num_generations is 0; expected at least 1"),
        ("r2m.floor=1.5", "r2m.floor is 1.5; expected a value between 0 and 1"),
        ("generation.temperature=0", "temperature is 0.*more than 0"),
        ("minibatches=7", "minibatches is 7; expected a divisor .* 512"),
        ("evaluation.every=0", "evaluation.every is 0; expected at least 1"),
        ("checkpoints.every=-1", "checkpoints.every is -1; expected at least 0"),
        ("checkpoints.keep=0", "checkpoints.keep is 0; expected at least 1"),
        ("generation.batch_size=0", "generation.batch_size is 0; expected at least 1"),
        ("micro_batch_size=0", "micro_batch_size is 0; expected at least 1"),
        ("micro_batch_tokens=0", "micro_batch_tokens is 0; expected at least 1"),
        ("evaluation.stop_at_kl=high", "evaluation.stop_at_kl: .*number.*given 'high'"),
        ("evaluation.samples_every=none", "evaluation.samples_every: .*integer.*given 'none'"),
        ("placement.attention=1", "placement.attention: .*given 1"),
        ("placement.quantize_reward_model=2bit", "placement.quantize_reward_model: .*'8bit' or '4bit'"),
        ("trackers=[mlflow]", "trackers.0: .*'tensorboard', 'wandb' or 'trackio'; given 'mlflow'"),
        ("lr_schedule=step", "lr_schedule: .*'constant', 'linear' or 'cosine'"),
        ("evaluation=5", "evaluation: .*given 5"),
        ("rounds", "override 'rounds'; expected key=value"),
        ("rounds.x=1", "unknown key|rounds"),
    ],
)
def test_a_mistake_is_one_clear_error(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_two_sizes_of_a_micro_batch_are_an_error():
    message = "micro_batch_size is 8 and micro_batch_tokens 4096; expected one of them"
    with pytest.raises(ValueError, match=message):
        load_config(None, ["micro_batch_size=8", "micro_batch_tokens=4096"])


@pytest.mark.parametrize(
    ("overrides", "size", "first_epoch", "kept_together"),
    [
        ([], Tokens(8 * 1024), 1, 8),  # 8 sequences of the greatest length: a group
        (["num_generations=9"], Tokens(8 * 1024), 0, 1),
        (["micro_batch_tokens=8191"], Tokens(8191), 0, 1),
        (["micro_batch_tokens=300", "algorithm=remax"], Tokens(300), 1, 1),
        (["minibatches=2"], Tokens(8 * 1024), 0, 1),
        (["micro_batch_size=16"], 16, 1, 8),
        (["micro_batch_size=12"], 12, 0, 1),
    ],
)
def test_micro_batches_keep_groups_together_where_the_first_epoch_scores(overrides, size, first_epoch, kept_together):
    config = load_config(None, overrides)
    assert (config.batch_size, config.first_epoch, config.kept_together) == (size, first_epoch, kept_together)


@pytest.mark.parametrize(
    ("algorithm", "feedback", "compared_by"),
    [
        ("rloo", "none", "rloo"),
        ("grpo", "frozen", "grpo"),
        ("rloo", "head", "rloo and GREBT"),
        ("remax", "trained", "GREBT"),
        ("remax", "head", "GREBT"),
        ("reinforce++", "trained", "GREBT"),
        ("remax", "none", None),
        ("remax", "frozen", None),
        ("reinforce++", "none", None),
        ("reinforce++", "frozen", None),
    ],
)
def test_one_response_to_a_prompt_does_where_nothing_compares_the_responses_of_a_group(
    algorithm, feedback, compared_by
):
    settings = [f"algorithm={algorithm}", f"r2m.feedback={feedback}", "kl.placement=reward", "num_generations=1"]
    if compared_by is None:
        assert load_config(None, settings).num_generations == 1
    else:
        with pytest.raises(ValueError, match=f"are compared by {compared_by}: expected at least 2"):
            load_config(None, settings)


@pytest.mark.parametrize("feedback", ["none", "head"])
@pytest.mark.parametrize("source", ["reference", "noise"])
def test_a_source_of_hidden_states_that_nothing_reads_is_an_error(feedback, source):
    message = f"r2m.source is '{source}', and r2m.feedback '{feedback}' uses no hidden states"
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"r2m.feedback={feedback}", f"r2m.source={source}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["r2m.feedback=head"], "r2m.scale_anchor is true, and r2m.feedback 'head' uses no hidden states"),
        (
            ["r2m.feedback=frozen", "num_generations=1", "algorithm=remax"],
            "are compared by r2m.scale_anchor: expected at least 2",
        ),
    ],
)
def test_an_anchor_of_what_does_not_change_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["r2m.scale_anchor=true", *settings])


def test_a_file_that_is_no_mapping_is_named(tmp_path):
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(["rounds", 3]))
    with pytest.raises(ValueError, match=r"list\.yaml holds a list; expected a mapping"):
        load_config(tmp_path / "list.yaml")


def test_the_blocks_can_be_left_out_and_switched_off(tmp_path):
    (tmp_path / "run.yaml").write_text("checkpoints: {every: 0}\nevaluation: {samples_every: 0}\n")
    config = load_config(tmp_path / "run.yaml")
    assert (config.checkpoints.every, config.checkpoints.keep) == (0, 2)
    assert (config.evaluation.samples_every, config.evaluation.every) == (0, 5)
    assert config.placement == R2MConfig().placement


def test_the_defaults_are_the_papers_dialogue_setup():
    config = R2MConfig()
    assert (config.prompts_per_round, config.num_generations, config.epochs) == (64, 8, 2)
    assert (config.r2m.alpha, config.r2m.inner_width, config.generation.temperature) == (0.3, 2048, 0.7)


# ---- the same checks in Python ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R2MConfig(algorithm="RLOO"), "algorithm: .*'rloo', 'grpo', .*; given 'RLOO'"),
        (lambda: R2MConfig(rounds=2.5), "rounds: .*integer.*given 2.5"),
        (lambda: R2MConfig(r2m={"flor": 0.7}), r"unknown key 'r2m.flor'; did you mean 'r2m.floor'\?"),
        (lambda: R2MConfig(trackers="wandb"), "trackers: .*list; given 'wandb'"),
        (lambda: R2MConfig(lora=8), "lora: .*given 8"),
        (lambda: R2MConfig(minibatches=7), "minibatches is 7; expected a divisor"),
        (lambda: R2MConfig(columns={"promt": "text"}), "columns: unknown field 'promt'; expected 'prompt'"),
        (lambda: R2MConfig(evaluation={"columns": {"promt": "text"}}), "evaluation.columns: unknown field 'promt'"),
        (lambda: R2M(feedback="trainned"), "r2m.feedback: .*given 'trainned'"),
        (lambda: R2M(floor=1.5), "r2m.floor is 1.5; expected a value between 0 and 1"),
        (lambda: R2M(flor=0.7), r"unknown key 'r2m.flor'; did you mean 'r2m.floor'\?"),
        (lambda: KL(placement="rewards"), "kl.placement: .*'loss' or 'reward'; given 'rewards'"),
        (lambda: replace(R2MConfig(), algorithm="RLOO"), "algorithm: .*given 'RLOO'"),
        (lambda: replace(R2MConfig(), rounds=0), "rounds is 0; expected at least 1"),
        (lambda: setattr(R2MConfig(), "lr_schedule", "step"), "lr_schedule: .*given 'step'"),
        (lambda: setattr(R2MConfig().r2m, "source", "none"), "r2m.source: .*given 'none'"),
        (lambda: setattr(R2MConfig(), "round", 3), r"unknown key 'round'; did you mean 'rounds'\?"),
    ],
)
def test_a_mistake_in_python_is_the_error_of_the_file(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_block_may_be_a_mapping_and_is_a_block_then():
    config = R2MConfig(r2m={"floor": 0.7}, lora={"rank": 4})
    assert config == R2MConfig(r2m=R2M(floor=0.7), lora=Lora(rank=4))
    assert config.r2m.attends and config.lora.alpha == 32


def test_configs_are_copied_pickled_and_replaced_whole():
    config = R2MConfig(lora=Lora(rank=4), rounds=7)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    other = replace(config, rounds=8)
    other.r2m.floor = 0.1
    assert (config.rounds, config.r2m.floor) == (7, 0.6)  # no block is shared
