"""Real runs of TRL's trainers on tiny models: rewards and the reward model's step against plain computations."""

import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "r2m"))  # for tiny

import tiny  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

from r2m.config import R2M, Preferences  # noqa: E402
from r2m.integrations.trl import (  # noqa: E402
    checks,
    passes,
    r2m_reward,
)
from r2m.method.hidden_states import policy_backbone  # noqa: E402
from r2m.method.reward_model import R2MRewardModel  # noqa: E402
from r2m.method.updater import R2MUpdater  # noqa: E402
from r2m.policy.passes import disable_dropout  # noqa: E402
from r2m.preferences import queue  # noqa: E402
from r2m.preferences.store import LABELS  # noqa: E402
from r2m_kernels import time_weight  # noqa: E402

K = 4
TEXTS = ["say a", "hello there", "count: 1 2 3", "why"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
TRAINERS = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}
WITH_DROPOUT = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5, "task_type": "CAUSAL_LM"}
LABELLED = {"labeller": f"{__name__}:greater", "per_round": 2}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


asked = []  # pairs that `greater` was asked about


def greater(pairs):
    asked.extend(pairs)
    return [float(pair.first > pair.second) for pair in pairs]


def broken(pairs):
    raise OSError("the judge is down")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def reward_checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))


class Run:
    """A trainer of TRL with R2M. Every call of its reward function is recorded, and every reward is compared with
    `R2MRewardModel.score` on hidden states of the policy as it is then, one unpadded sequence at a time."""

    def __init__(self, folder, checkpoint, kind="rloo", *, capture="scoring", settings=None, preferences=None,
                 prompts=TEXTS, model=None, callbacks=(), trainer=None, tolerance=1e-4, **args):  # fmt: skip
        self.settings = R2M(**({"learning_rate": 1e-3, "floor": 0.3} | (settings or {})))
        self.model = tiny.policy() if model is None else model
        self.tokenizer = tiny.tokenizer(pad="</s>")
        self.tokenizer.padding_side = "left"
        self.reward_model = tiny.reward_model(checkpoint, self.model)
        self.reward, self.callback = r2m_reward(
            self.reward_model,
            num_generations=K,
            settings=self.settings,
            preferences=Preferences(**preferences or {}),
            capture=capture,
        )
        self.tolerance, self.calls = tolerance, []
        trainer_class, config_class = TRAINERS[kind]
        defaults = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": K,
            "num_iterations": 2,
            "max_completion_length": 6,
            "max_steps": 4,
            "beta": 0.0,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        config = config_class(**(defaults | args))
        self.trainer = trainer_class(
            model=self.model,
            reward_funcs=self.checked_reward,
            callbacks=[self.callback, *callbacks],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
            processing_class=self.tokenizer,
            **(trainer or {}),
        )

    def checked_reward(self, prompts, completions, completion_ids, **columns):
        given = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        training = self.trainer.model.training
        weight = self.callback._updater.weight if training else self.settings.floor
        scale = 1.0 if self.callback._updater is None else self.callback._updater.scale
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        call = types.SimpleNamespace(
            training=training, weight=weight, prompts=prompts, texts=texts, completion_ids=completion_ids, rewards=given
        )
        rte, hidden = self.reward_model.embed(prompts, texts), self.hidden(call)
        with torch.no_grad():
            expected = [
                scale * self.reward_model.score(rte[i : i + 1], h[None], weight=weight).item()
                for i, h in enumerate(hidden)
            ]
        assert given == pytest.approx(expected, abs=self.tolerance)
        self.calls.append(call)
        return given

    @torch.no_grad()
    def hidden(self, call, model=None):
        """The policy feedback [length, D_p] of each sequence of a call, from `model`, else the policy as it is now."""
        backbone, feedback = policy_backbone(model or self.model_in_trainer), []
        for prompt, ids in zip(call.prompts, call.completion_ids, strict=True):
            if isinstance(prompt, str):
                prompt_ids = self.tokenizer(prompt).input_ids
            else:
                prompt_ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            args = self.trainer.args
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                # Without a mask: no pass that the adapter would take for the trainer's.
                states = backbone(input_ids=torch.tensor([prompt_ids + ids]))
            start = len(prompt_ids) if self.settings.positions == "response" else 0
            feedback.append(states.last_hidden_state[0, start:-1])
        return feedback

    @property
    def model_in_trainer(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def train(self, **options):
        self.trainer.train(**options)
        return self

    @property
    def labels(self):
        lines = (Path(self.trainer.args.output_dir) / LABELS).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def weights(self):
        return {name: value.clone() for name, value in self.reward_model.state_dict().items()}


@pytest.fixture
def run(tmp_path, reward_checkpoint):
    return lambda *args, folder=tmp_path / "run", **options: Run(folder, reward_checkpoint, *args, **options)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


class At(TrainerCallback):
    """Calls `act` at the end of optimizer step `step`, or of each."""

    def __init__(self, act, step=None):
        self.act, self.step = act, step

    def on_step_end(self, args, state, control, **kwargs):
        if self.step in (None, state.global_step):
            self.act()


def saved_and_labelled(labeller):
    """Three rollouts, of one epoch, with a checkpoint after each."""
    preferences = {"labeller": labeller, "per_round": 2, "wait": 0 if labeller == "queue" else 60}
    prompts = [f"{text} {end}" for text in TEXTS for end in "xy"]  # in another epoch TRL shuffles a resumed run anew
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    return {"prompts": prompts, "preferences": preferences, **saving}


def answer_all(folder):
    """As a person does, by the file that `r2m label` writes."""
    for id, question in queue.questions(folder).items():
        if id not in queue.answers(folder):
            queue.answer(folder, id, float(question["first"] > question["second"]), by="ann", left="first")


# ---- rewards ----

# GRPO takes its scoring pass where a rollout is no divisor of an optimizer step's micro-batches.
CASES = {
    "RLOO": ("rloo", {}),
    "RLOO, forward": ("rloo", {"capture": "forward"}),
    "GRPO, two iterations": ("grpo", {}),
    "GRPO, defaults, forward": ("grpo", {"num_iterations": 1, "capture": "forward"}),
    "chat": ("rloo", {"prompts": CHATS}),
    "chat, forward": ("grpo", {"prompts": CHATS, "capture": "forward"}),
    "response only": ("rloo", {"settings": {"positions": "response"}}),
    "several steps an iteration": ("rloo", {"steps_per_generation": 4}),
    "no gradient checkpointing": ("rloo", {"gradient_checkpointing": False}),
    "uneven micro-batches": ("rloo", {"per_device_train_batch_size": 6, "steps_per_generation": 2}),
    "bfloat16 autocast": ("rloo", {"bf16": True, "tolerance": 0.1}),
    "bfloat16 autocast, forward": ("rloo", {"bf16": True, "tolerance": 0.1, "capture": "forward"}),
    "GRPO, bfloat16 autocast": ("grpo", {"bf16": True, "tolerance": 0.1}),
    "padded to a multiple": ("rloo", {"pad_to_multiple_of": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_rewards_are_the_reward_models_on_the_policys_hidden_states(run, case):
    kind, options = CASES[case]
    one = run(kind, **options).train()  # compares every reward
    args = one.trainer.args
    rollouts = args.max_steps * args.gradient_accumulation_steps // (args.steps_per_generation * args.num_iterations)
    weights = [time_weight(t, rollouts, 0.3) for t in range(1, rollouts + 1)]
    assert [call.weight for call in one.calls] == pytest.approx(weights)
    assert [row["round"] for row in one.callback.history] == list(range(1, rollouts + 1))
    assert [row["weight"] for row in one.callback.history] == pytest.approx(weights)


def test_the_trainer_is_given_a_plain_function(run):
    one = run()
    assert one.reward.__name__ == "r2m_reward" and not isinstance(one.reward, torch.nn.Module)


def test_two_optimizer_steps_may_share_a_rollout_and_two_rollouts_a_step(run):
    one = run(gradient_accumulation_steps=4, steps_per_generation=1, max_steps=2).train()
    assert [row["round"] for row in one.callback.history] == [1, 2, 3, 4]


def test_equal_completions_take_their_rows_in_turn(run):
    one = run(temperature=1e-3, max_completion_length=2).train()
    assert any(len(set(map(tuple, call.completion_ids))) < len(call.completion_ids) for call in one.calls)
    assert len(one.callback.history) == 2


def test_a_pass_of_someone_else_does_not_count(run):
    mask = torch.ones(2, 5, dtype=torch.long)

    def look():
        with torch.no_grad():
            one.model(input_ids=mask, attention_mask=mask)

    one = run(callbacks=[At(look)])
    one.train()
    assert len(one.callback.history) == 2


# ---- the reward model's update ----


def loss_of(labels, updater, texts):
    """Bradley-Terry on the lines of a file of labels, by an updater that has collected `texts`."""
    pairs = [(texts.index(label["first"]), texts.index(label["second"])) for label in labels]
    margins = updater.margins(updater.keep(pairs))
    signs = torch.tensor([1.0 if label["label"] else -1.0 for label in labels])
    return -torch.nn.functional.logsigmoid(signs * margins).mean()


@pytest.mark.parametrize(
    ("kind", "capture", "positions", "preferences"),
    [
        ("rloo", "scoring", "all", None),
        ("grpo", "forward", "all", None),
        ("grpo", "forward", "response", None),
        ("rloo", "scoring", "response", LABELLED),
        ("grpo", "forward", "all", LABELLED | {"grebt": 0.5}),
    ],
)
def test_a_rollout_trains_the_reward_model_as_an_updater_does(run, kind, capture, positions, preferences):
    """One rollout of two iterations, one optimizer step each: the feedback is refreshed after the first step."""
    refreshed, seen = [], []

    def between():
        refreshed.extend(one.hidden(one.calls[0]))
        seen.append(moved(before, one.weights()))

    options = {
        "capture": capture,
        "preferences": preferences,
        "settings": {"positions": positions, "floor": 0.3, "learning_rate": 1e-3},
    }
    one = run(kind, max_steps=2, callbacks=[At(between, step=1)], **options)
    before, by_hand = one.weights(), copy.deepcopy(one.reward_model)
    one.train()
    assert seen == [set()]  # only the last optimizer step of the rollout is followed by the update
    (call,) = one.calls
    assert max((a - b).abs().max() for a, b in zip(refreshed, one.hidden(call), strict=True)) > 0.1  # the policy moves

    updater = R2MUpdater(by_hand, one.settings, total_steps=1, num_generations=K)
    updater.begin_round(by_hand.embed(call.prompts, call.texts), 1)
    for row, hidden in enumerate(refreshed):
        updater.collect([row], hidden[None], torch.ones(1, len(hidden), dtype=torch.bool))
    labels_loss = loss_of(one.labels, updater, call.texts) if preferences else None
    rewards, initial = torch.tensor(call.rewards), by_hand.vanilla_score(updater._rte).detach()
    metrics = updater.step(rewards, labels_loss, grebt=(preferences or {}).get("grebt", 1.0))

    after = one.weights()
    assert moved(before, after) == {"attention.w_q", "attention.w_k", "attention.w_v", "attention.w_o", "head.weight"}
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5)  # of a step of 1e-3
    (row,) = one.callback.history
    metrics |= {"round": 1, "weight": updater.weight, "reward/mean": rewards.mean().item()}
    metrics |= {"reward/initial": initial.mean().item(), "reward/std": rewards.std().item()}
    assert {key: row[key] for key in metrics} == pytest.approx(metrics, rel=1e-3, abs=1e-4)
    assert row.get("labels/given") == (len(one.labels) if preferences else None)


def test_frozen_feedback_measures_and_changes_nothing(run):
    one = run(settings={"feedback": "frozen"})
    before = one.weights()
    one.train()
    assert not moved(before, one.weights())
    assert all("grebt/loss" in row and "rm/grad_norm" not in row for row in one.callback.history)


def test_anchored_rewards_are_scaled_and_those_of_held_out_batches_too(run):
    one = run(settings={"scale_anchor": True}, per_device_eval_batch_size=4).train()  # compares every reward
    scales = [row["reward/scale"] for row in one.callback.history]
    assert scales[0] == 1.0 and abs(scales[1] - 1.0) > 0.01
    one.trainer.evaluate()
    assert not one.calls[-1].training


def test_a_labeller_that_fails_costs_no_rollout(run, caplog):
    one = run(preferences=LABELLED | {"labeller": f"{__name__}:broken"}).train()
    assert [(row["labels/failed"], row["labels/given"]) for row in one.callback.history] == [(1, 0)] * 2
    assert caplog.text.count("the judge is down") == 1


def test_what_goes_wrong_with_the_rewards_is_said_while_it_does_and_at_the_end(run, caplog):
    run(max_steps=6, settings={"learning_rate": 0.1}).train()
    assert "times as wide inside groups as in round 1" in caplog.text
    assert "times as wide inside groups over the last third as over the first" in caplog.text


def test_metrics_reach_the_trainers_log(run):
    logs = run(max_steps=6, preferences=LABELLED).train().trainer.state.log_history
    assert [round(log["r2m/weight"], 6) for log in logs if "r2m/weight" in log] == [0.75, 0.3, 0.3]
    assert all(-1 <= log["r2m/correlation"] <= 1 for log in logs if "r2m/correlation" in log)
    for name in ("grebt/loss", "labels/agreement", "reward/group_std"):
        assert sum(f"r2m/{name}" in log for log in logs) == 2  # with the rollout after


# ---- adapters ----


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("reference", ["adapter off", "an adapter called ref"])
def test_a_reference_pass_through_the_policy_is_not_the_policys(run, kind, reference):
    if reference == "adapter off":
        one = run(kind, beta=0.1, trainer={"peft_config": LORA})
    else:
        model = get_peft_model(tiny.policy(), LORA)
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        one = run(kind, beta=0.1, model=model)
    one.train()  # compares every reward, after the adapter has moved
    assert len(one.callback.history) == 2
    call = one.calls[-1]
    with_adapter = one.hidden(call)
    with one.model_in_trainer.disable_adapter():
        assert max((a - b).abs().max() for a, b in zip(with_adapter, one.hidden(call), strict=True)) > 1e-2


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_pass_of_a_separate_reference_model_is_not_the_policys(run, kind, tmp_path):
    tiny.policy().save_pretrained(tmp_path / "policy")  # TRL loads the reference by the policy's name
    one = run(kind, beta=0.1, model=type(tiny.policy()).from_pretrained(tmp_path / "policy"))
    assert one.trainer.ref_model is not None
    one.train()  # compares every reward, after the policy has moved
    assert len(one.callback.history) == 2


def test_only_a_reference_pass_is_no_scoring_pass(run):
    one = run("grpo", beta=0.1, num_iterations=1, trainer={"peft_config": LORA})
    with pytest.raises(RuntimeError, match=r"did not run the policy .* expected capture='forward'"):
        one.train()


# ---- held-out batches ----


def test_held_out_batches_train_nothing_and_are_scored_at_omega(run):
    one = run(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    before = one.weights()
    one.trainer.evaluate()  # before training
    assert [(call.training, call.weight) for call in one.calls] == [(False, 0.3)] * 2
    one.train()  # with evaluation inside each rollout, and between them
    assert [row["round"] for row in one.callback.history] == [1, 2]
    assert sum(call.training for call in one.calls) == 2 and sum(not call.training for call in one.calls) == 10
    assert moved(before, one.weights())
    trained = one.weights()
    one.trainer.evaluate()
    assert not moved(trained, one.weights()) and not one.callback._captured


def test_held_out_batches_of_grpo(run):
    one = run("grpo", capture="forward", num_iterations=1, per_device_eval_batch_size=4)
    one.trainer.evaluate()
    assert len(one.calls) == 2 and not one.callback.history


# ---- checkpoints ----


@pytest.mark.parametrize(("kind", "preferences"), [("rloo", None), ("rloo", LABELLED), ("grpo", LABELLED)])
def test_a_resumed_run_ends_where_the_whole_one_does_and_asks_nothing_twice(run, tmp_path, kind, preferences):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "preferences": preferences}
    asked.clear()
    whole = run(kind, folder=tmp_path / "run", **saving).train()
    told = len(asked)
    resumed = run(kind, folder=tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [call.texts for call in resumed.calls] == [call.texts for call in whole.calls[1:]]
    assert measured(resumed.callback.history) == measured(whole.callback.history) and len(whole.callback.history) == 3
    assert not moved(whole.weights(), resumed.weights())
    assert len(asked) == told == (6 if preferences else 0)
    saved = R2MRewardModel.from_pretrained(tmp_path / "run" / "checkpoint-6" / "r2m", dtype=torch.float32)
    assert not moved(whole.weights(), saved.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("labeller", [LABELLED["labeller"], "queue"])
def test_a_run_that_is_killed_ends_as_the_whole_one_and_asks_nothing_twice(tmp_path, reward_checkpoint, labeller):
    whole = Run(
        tmp_path / "whole",
        reward_checkpoint,
        callbacks=[At(lambda: answer_all(tmp_path / "whole"))],
        **saved_and_labelled(labeller),
    ).train()
    script, folder = Path(__file__).parent / "trl_killed.py", tmp_path / "run"
    command = [sys.executable, str(script), str(folder), str(reward_checkpoint), labeller]
    for status in (-signal.SIGKILL, 0):
        done = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr[-3000:]
    result = torch.load(folder / "result.pt")
    assert result["history"] == measured(whole.callback.history) and len(result["history"]) == 3
    assert not moved(whole.weights(), result["weights"])
    assert (folder / LABELS).read_text() == (tmp_path / "whole" / LABELS).read_text()
    assert sum(row["labels/given"] + row["labels/late"] for row in result["history"]) == len(whole.labels) > 0
    assert queue.questions(folder) == queue.questions(tmp_path / "whole")


def measured(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


def test_a_checkpoint_of_another_place_or_without_a_reward_model(run, tmp_path):
    run(folder=tmp_path / "run", save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(
        FileNotFoundError, match=r"training goes on after step 2, and .*elsewhere.* holds no reward model"
    ):
        run(folder=tmp_path / "elsewhere").train(resume_from_checkpoint=str(checkpoint))
    labelled = run(folder=tmp_path / "run", preferences=LABELLED)
    with pytest.raises(ValueError, match=r"greater', and .*r2m is of a run without fresh labels; expected preferences"):
        labelled.train(resume_from_checkpoint=str(checkpoint))
    one = run(folder=tmp_path / "elsewhere", resume_from_checkpoint=str(checkpoint))
    one.train(resume_from_checkpoint=str(checkpoint))
    assert [row["round"] for row in one.callback.history] == [1, 2] and len(one.calls) == 1


def test_training_that_ends_inside_a_rollout_says_so(run, caplog):
    one = run(max_steps=3).train()
    assert len(one.callback.history) == 1
    assert "training ended inside rollout 2" in caplog.text


# ---- warnings and refusals ----


@pytest.mark.parametrize(("iterations", "steps", "warns"), [(1, 2, True), (2, 2, False), (1, 4, False)])
def test_a_refresh_that_changes_nothing(run, caplog, iterations, steps, warns):
    run(num_iterations=iterations, steps_per_generation=steps, max_steps=1).train()
    assert ("the refreshed hidden states equal the scored ones" in caplog.text) == warns


def test_two_generations(run, caplog, monkeypatch):
    monkeypatch.setitem(globals(), "K", 2)
    run(max_steps=2).train()
    assert "GREBT is Bradley-Terry alone" in caplog.text


def test_grpo_under_its_defaults_needs_a_pass_of_its_own(run):
    with pytest.raises(RuntimeError, match=r"GRPOTrainer does not .* expected capture='forward'"):
        run("grpo", num_iterations=1).train()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_generations": 2}, "num_generations is 4 in r2m_reward and 2 in the trainer's args"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions is True: .* expected False"),
        ({"generation_kwargs": {"use_cache": False}}, "generation_kwargs has use_cache=False"),
    ],
)
def test_arguments_of_the_trainer_that_do_not_fit(run, args, message):
    with pytest.raises(ValueError, match=message):
        run(**args)


def test_groups_that_straddle_processes(run):
    one = run()
    args = one.trainer.args
    args.per_device_train_batch_size, args.steps_per_generation = 2, 3  # of 2 processes: TRL sees 12 samples, 3 groups
    with pytest.raises(ValueError, match=r"steps_per_generation is 2 \* 3 = 6 samples .* multiple of .* = 4, so that"):
        checks.check_arguments(args, K)


def test_a_backbone_that_some_processes_have_not_loaded(run, monkeypatch):
    reward_model = run().reward_model
    checks.check_backbone(reward_model)
    monkeypatch.setattr(checks.processes, "gather_items", lambda items: [*items, "of empty weights"])
    with pytest.raises(ValueError, match=r"other weights in some processes; .* fsdp_cpu_ram_efficient_loading: false"):
        checks.check_backbone(reward_model)


def test_processes_wait_for_one_another_longer_than_for_the_labeller():
    args = types.SimpleNamespace(world_size=2, ddp_timeout=1800)
    checks.check_wait(args, Preferences(wait=1800.0))
    with pytest.raises(ValueError, match=r"wait is 1800 seconds on 2 processes.* ddp_timeout = 1800 seconds"):
        checks.check_wait(args, Preferences(**LABELLED, wait=1800.0))


def test_other_trainers(tmp_path):
    with pytest.raises(TypeError, match="TrainingArguments without num_generations; expected RLOOConfig or GRPOConfig"):
        checks.check_arguments(TrainingArguments(str(tmp_path), use_cpu=True), K)


def test_a_policy_of_another_width(run):
    one = run()
    reward, callback = r2m_reward(one.reward_model, num_generations=K)
    with pytest.raises(ValueError, match=r"width 32 .* the policy given has width 48"):
        trl.RLOOTrainer(
            model=tiny.policy(48),
            reward_funcs=reward,
            callbacks=[callback],
            args=one.trainer.args,
            train_dataset=one.trainer.train_dataset,
            processing_class=one.tokenizer,
        )


def test_callback_and_reward_belong_together(run):
    one, two = run(), run()
    two.trainer.reward_funcs = [one.reward]
    with pytest.raises(RuntimeError, match="did not run the policy"):
        two.train()
    alone, _ = r2m_reward(one.reward_model, num_generations=K)
    one.trainer.reward_funcs = [alone]
    with pytest.raises(RuntimeError, match="not given the callback"):
        one.train()
    three = run()
    three.trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    with pytest.raises(RuntimeError, match="asked for no reward"):
        three.train()
    with pytest.raises(ValueError, match="belongs to another trainer"):
        three.callback.on_init_end(three.trainer.args, three.trainer.state, three.trainer.control)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([[7, 8, 9]] * 2, "ends in .* and the completion to be rewarded in"), ([[1]] * 3, "ran over 2 sequences .* of 3")],
)
def test_completions_that_the_policy_did_not_run_over(run, ids, error):
    one = run()
    one.callback._updater = R2MUpdater(one.reward_model, one.settings, total_steps=1, num_generations=K)
    tokens = torch.tensor([[3, 4, 5, 6]] * 2)
    with torch.no_grad():
        one.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    with pytest.raises(RuntimeError, match=error):
        one.reward(prompts=["a"] * len(ids), completions=["b"] * len(ids), completion_ids=ids, log_metric=print)


def test_training_on_a_sequence_without_reward():
    rollout = passes.Rollout(3, [], [], torch.zeros(2), torch.zeros(2), 1, {(1, 2): [0, 1]}, [0, 0])
    assert [rollout.row_of((1, 2)), rollout.row_of((1, 2))] == [0, 1] and rollout.is_complete
    with pytest.raises(RuntimeError, match="rollout 3: the policy trains on a sequence that was not rewarded"):
        rollout.row_of((1, 3))


def test_a_reward_that_is_not_finite(run):
    one = run()
    with torch.no_grad():
        one.reward_model.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="8 of 8 rewards are not finite"):
        one.train()


@pytest.mark.parametrize("completion", [[], [{"content": "a"}, {"content": "b"}], [{"role": "assistant"}]])
def test_completions_with_tools(completion):
    with pytest.raises(TypeError, match="expected text, or one message with text"):
        checks.check_text(completion)


# ---- policies whose hidden states are not theirs alone ----


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox"])
def test_a_policy_whose_hidden_states_depend_on_padding_is_refused(run, architecture):
    model = tiny.policy_with_dropout(architecture)
    disable_dropout(model)
    if architecture == "gpt2":  # the others take positions from the mask, or relative ones
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel, whose hidden states .* behind padding.*R2MTrainer"):
            run(model=model)
    else:
        assert run(model=model).model.training


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"trainer": {"peft_config": LoraConfig(**WITH_DROPOUT)}}, r"Dropout\.p = 0\.5, and disable_dropout is False"),
        ({"model": "gpt_neox"}, r"Dropout\.p = 0\.5, GPTNeoXAttention\.attention_dropout = 0\.5, and .* is False"),
        # TRL's setting reaches modules of dropout alone.
        (
            {"model": "gpt_neox", "disable_dropout": True},
            r"with GPTNeoXAttention\.attention_dropout = 0\.5, and .* True",
        ),
    ],
)
def test_a_policy_with_dropout_is_refused_with_the_settings_name(run, options, named):
    if "model" in options:
        options = options | {"model": tiny.policy_with_dropout(options["model"])}
    with pytest.raises(ValueError, match=named + r".* expected disable_dropout=True in the trainer's args"):
        run(**options).train()


def test_dropout_that_the_trainer_switches_off_is_none(run):
    one = run(
        trainer={"peft_config": LoraConfig(**WITH_DROPOUT)}, disable_dropout=True
    ).train()  # compares every reward
    assert len(one.callback.history) == 2


def test_other_noise_in_training_mode_is_found(run):
    one = run()

    def noise(module, args, output):
        return output + torch.randn_like(output) if module.training else output

    one.model.model.layers[0].mlp.register_forward_hook(noise)
    state = torch.get_rng_state()
    assert checks.differs_in_training(one.model, one.callback._backbone, one.trainer.args)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"noise in training mode, such as a router's jitter"):
        one.train()


# ---- what the reward model reads ----


def test_a_reward_model_that_cannot_render_the_prompts_is_an_error_before_anything_is_sampled(run):
    one = run(prompts=[[{"role": "system", "content": "be"}, *chat] for chat in CHATS])
    one.reward_model.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}a"
    with pytest.raises(ValueError, match=r"reward_model: prompt .* the roles system, user, assistant: no system"):
        one.train()
    assert not one.calls


def test_the_reward_model_reads_the_reasoning_that_a_template_opens_or_the_trainer_parses_away(run, monkeypatch):
    def embed(prompts, texts):
        read.extend(texts)
        raise InterruptedError  # all that is asked for here

    one, read = run(prompts=CHATS), []
    one.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    monkeypatch.setattr(one.reward_model, "embed", embed)
    ids = one.tokenizer("so</think>yes").input_ids
    message = {"role": "assistant", "content": "yes", "reasoning_content": "so"}
    with pytest.raises(InterruptedError):
        one.reward(prompts=CHATS[:2], completions=[[message]] * 2, completion_ids=[ids] * 2, log_metric=print)
    assert read == ["<think>\nso</think>yes"] * 2


# ---- rounds ----


def test_an_epoch_that_does_not_fill_a_step_counts_what_it_has(run, tmp_path):
    """Two epochs of 3 rollouts, of 2 micro-batches each: a step of 4 and one of 2 micro-batches."""
    shape = {
        "prompts": ["a", "b", *TEXTS], "gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 1,
        "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    expected = [time_weight(t, 6, 0.3) for t in range(1, 7)]
    whole = run(folder=tmp_path / "run", **shape).train()
    assert [call.weight for call in whole.calls] == pytest.approx(expected)
    resumed = run(folder=tmp_path / "run", **shape)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [call.weight for call in resumed.calls] == pytest.approx(expected[3:])
    assert [row["round"] for row in resumed.callback.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("steps", "accumulated", "epoch", "expected"),
    [(3, 4, None, 12), (3, 4, 6, 10), (4, 4, 6, 12), (1, 4, 6, 4), (2, 4, 3, 6), (5, 2, 4, 10), (0, 2, 3, 0)],
)
def test_micro_batches_of_steps(steps, accumulated, epoch, expected):
    assert passes.micro_batches(steps, accumulated, epoch) == expected


@pytest.mark.parametrize("installed", ["0.29.1", "1.15.0"])
def test_releases_that_are_not_supported(run, monkeypatch, installed):
    monkeypatch.setattr(checks, "version", lambda name: installed)
    with pytest.raises(ImportError, match=f"trl is {installed}; expected >=1.0,!=1.15.0"):
        run()


def test_the_extra_asks_for_the_same_releases():
    line = f'trl = ["r2m-kernels[train]", "trl{checks.SUPPORTED}", "datasets"]'
    assert line in (ROOT / "pyproject.toml").read_text()


def test_no_trl(monkeypatch, run):
    def missing(name):
        raise checks.PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    with pytest.raises(ImportError, match="needs TRL: pip install"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": "step"}, "update_every is 'step'; expected 'rollout'"),
        ({"capture": "generation"}, "capture is 'generation'; expected 'scoring' or 'forward'"),
        ({"settings": R2M(feedback="none")}, "settings.feedback is 'none'"),
        ({"settings": R2M(feedback="head")}, "settings.feedback is 'head'"),
        (
            {"settings": R2M(feedback="frozen"), "preferences": Preferences(**LABELLED)},
            "preferences.labeller is set, and settings.feedback 'frozen' learns nothing; expected 'trained'",
        ),
        ({"preferences": Preferences(labeller="missing.py:label")}, "'missing.py:label'; there is no file missing.py"),
        ({"settings": R2M(source="noise")}, "settings.source is 'noise'; expected 'policy'"),
    ],
)
def test_arguments_out_of_range(reward_checkpoint, options, message):
    reward_model = tiny.reward_model(reward_checkpoint, tiny.policy())
    with pytest.raises(ValueError, match=message):
        r2m_reward(reward_model, num_generations=K, **options)


def test_reward_models_that_cannot_be_used(reward_checkpoint):
    with pytest.raises(ValueError, match="has no statistics yet"):
        r2m_reward(tiny.reward_model(reward_checkpoint, tiny.policy(), standardize=True), num_generations=K)
    reward_model = tiny.reward_model(reward_checkpoint, tiny.policy())
    next(reward_model.backbone.parameters()).ds_id = 0  # how DeepSpeed marks its partitions
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3"):
        r2m_reward(reward_model, num_generations=K)


# ---- several processes, and the example ----


def run_two_processes(launch, folder, reward_checkpoint, kind):
    """trl_two_processes.py; returns whether the policy was sharded."""
    script = Path(__file__).parent / "trl_two_processes.py"
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(folder), str(reward_checkpoint), kind],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first["history"] == second["history"] and first["history"][0]["labels/given"] == 2
    assert first["texts"] != second["texts"]
    assert not moved(first["weights"], second["weights"])
    # One step on the groups of both, from the first one's weights.
    torch.testing.assert_close(first["weights"], first["by_hand"], rtol=0, atol=2e-5)
    return first["is_sharded"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_two_processes_keep_one_reward_model(tmp_path, reward_checkpoint, kind):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert not run_two_processes(launch, tmp_path, reward_checkpoint, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind"), [("fsdp2", "rloo"), ("fsdp2", "grpo"), ("zero2", "rloo"), ("zero3", "rloo")]
)
def test_two_processes_of_a_sharded_policy_by_the_pages_configs(tmp_path, reward_checkpoint, config, kind):
    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    page = (ROOT / "docs" / "trl.md").read_text()
    (tmp_path / "config.yaml").write_text(re.search(rf"^# {config}\.yaml.*?^```", page, re.M | re.S)[0].strip("`"))
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "config.yaml"),
        "--num_processes",
        "2",
    ]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    assert run_two_processes(launch, tmp_path, reward_checkpoint, kind) == (config != "zero2")


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "trl_rloo.py"], capture_output=True, text=True, timeout=180, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "r2m/grebt/loss" in done.stdout
