"""Hand-over: what the exported folder loads as, what its card says, and what is uploaded."""

import dataclasses
import json
import logging

import architectures
import pytest
import tiny
import torch
import yaml
from huggingface_hub import RepoUrl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

from r2m import R2MRewardModel
from r2m.cli import app
from r2m.commands import export
from r2m.commands.export import export_run, push_to_hub, write_policy_card
from r2m.config import Lora, R2MConfig, config_to_yaml
from r2m.policy.load import load_policy
from r2m.policy.reference import freeze_reference
from r2m_kernels import __version__

IDS = torch.tensor([[5, 9, 40, 7], [200, 3, 8, 11]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def move(policy, scale=0.1):
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)


@pytest.fixture
def make_run(tmp_path, reward_checkpoint):
    """The folder of a run that has ended, as trainer and checkpoints write it; returns (run, policy at the end)."""

    def build(*, lora=None, dtype=torch.float32, precision="float32", **model):
        base = tiny.policy(**model).to(dtype)
        base.generation_config.do_sample, base.generation_config.top_k = True, 17
        base.save_pretrained(tmp_path / "base")
        tiny.tokenizer(pad="</s>").save_pretrained(tmp_path / "base")
        run = tmp_path / "run"
        config = R2MConfig(
            policy=str(tmp_path / "base"), reward_model=str(reward_checkpoint), prompts="owner/prompts:train",
            output_dir=str(run), rounds=3, precision=precision, lora=lora,
        )  # fmt: skip
        policy = load_policy(config)
        torch.manual_seed(1)
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        for t in (1, 2, 3):
            move(policy)
            folder = run / f"checkpoint-{t}"
            reward_model.save_pretrained(folder / "reward_model")
            save_file(
                {n: p.data for n, p in policy.named_parameters() if p.requires_grad}, folder / "policy.safetensors"
            )
        policy.save_pretrained(run / "policy")
        tiny.tokenizer(pad="</s>").save_pretrained(run / "policy")
        reward_model.save_pretrained(run / "reward_model")
        rows = [
            {"round": t, "reward/mean": t / 10, "policy/kl": t / 100, "eval/judge": judge, "seconds/rollout": 12.5}
            for t, judge in ((1, 0.25), (2, 0.75), (3, 0.5))
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "config.yaml").write_text(config_to_yaml(config))
        return run, policy.eval()

    return build


def read_card(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


# ---- what loads ----


def test_full_tuning_loads_with_transformers(make_run, tmp_path, reward_checkpoint):
    run, policy = make_run()
    out = export_run(run, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(policy))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer.pad_token == "</s>"
    assert GenerationConfig.from_pretrained(out).top_k == 17
    reward_model = R2MRewardModel.from_pretrained(out / "reward_model")
    assert reward_model.config.backbone == str(out / "reward_model")  # a local one goes along


def test_an_adapter_loads_with_peft(make_run, tmp_path):
    run, policy = make_run(lora=Lora(rank=2))
    out = export_run(run, tmp_path / "out")
    assert torch.equal(
        logits(AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()), logits(policy)
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(out).top_k == 17
    assert not list(out.glob("model*.safetensors"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_merged_adapter_needs_no_peft_and_computes_what_the_adapter_does(make_run, tmp_path, precision):
    run, _ = make_run(lora=Lora(rank=2), precision=precision)
    out = export_run(run, tmp_path / "out", merge=True)
    assert not (out / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    adapter = AutoPeftModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_whole_model_has_the_dtype_it_came_in_and_is_merged_in_float32(make_run, tmp_path, lora):
    run, _ = make_run(lora=lora, dtype=torch.bfloat16, precision="bf16")
    out = export_run(run, tmp_path / "out", merge=True)
    exported = AutoModelForCausalLM.from_pretrained(out)
    if lora is None:
        exact = AutoModelForCausalLM.from_pretrained(run / "policy")
    else:
        exact = AutoPeftModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32).merge_and_unload()
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    for name, p in exported.named_parameters():
        assert torch.equal(p, exact.get_parameter(name).bfloat16())


@pytest.mark.parametrize(("which", "t"), [("last", 3), ("best", 2), ("1", 1)])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_checkpoint_is_exported_with_its_own_weights(make_run, tmp_path, which, t, lora):
    run, policy = make_run(lora=lora)
    saved = load_checkpoint_weights(run / f"checkpoint-{t}", policy)
    out = export_run(run, tmp_path / "out", checkpoint=which, merge=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out).eval()), saved, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE
    text = read_card(out)[1]
    assert f"{t} of 3 rounds of 64 prompts x 8 responses: {t * 512} trajectories" in text
    assert f"| `reward/mean` | 0.1 (1) | {t / 10:.4g} ({t}) |" in text


def load_checkpoint_weights(folder, policy):
    """The logits of `policy` with a checkpoint's weights in it."""
    policy.load_state_dict(load_file(folder / "policy.safetensors"), strict=False)
    return logits(policy)


def test_the_reference_adapter_stays_behind(make_run, tmp_path):
    run, policy = make_run(lora=Lora(rank=2))
    freeze_reference(policy)
    policy.save_pretrained(run / "policy", selected_adapters=[policy.active_adapter])
    out = export_run(run, tmp_path / "out")
    assert [file.parent for file in out.rglob("adapter_model.safetensors")] == [out]


# ---- adapters of weights that are read in two places ----


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"]}, True),
    ],
)
def test_a_merge_unties_embeddings_of_which_the_adapter_moved_one(make_run, tmp_path, settings, stays_tied):
    adapter = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    get_peft_model(tiny.policy(tie_word_embeddings=True), adapter).save_pretrained(tmp_path / "start")
    run, policy = make_run(lora=Lora(adapter=str(tmp_path / "start")), tie_word_embeddings=True)
    out = export_run(run, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), logits(policy), rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == stays_tied


@pytest.mark.parametrize(("lora", "merge"), [(None, False), (Lora(rank=2), False), (Lora(rank=2), True)])
def test_a_folder_that_loads_as_another_model_is_an_error_and_removed(make_run, tmp_path, monkeypatch, lora, merge):
    run, _ = make_run(lora=lora)
    owner = PreTrainedModel if lora is None or merge else PeftModel
    save = owner.save_pretrained

    @torch.no_grad()
    def save_another(model, folder, **options):
        weight = [p for name, p in model.named_parameters() if "q_proj" in name][-1]
        weight.mul_(-3)
        save(model, folder, **options)
        weight.div_(-3)

    monkeypatch.setattr(owner, "save_pretrained", save_another)
    with pytest.raises(ValueError, match="is not the trained policy: its logits are off by"):
        export_run(run, tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_peft_loads_differently_from_what_was_saved_is_an_error(tmp_path):
    """peft's renaming for Laguna takes the shared experts' weights for others."""
    model, folder = architectures.tiny_model(architectures.tiny_config("laguna")), tmp_path / "base"
    model.save_pretrained(folder)
    settings = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    config = R2MConfig(policy=str(folder), precision="float32", lora=Lora(adapter=str(tmp_path / "adapter")))
    with pytest.raises(ValueError, match=r"peft loads other weights than are saved there, such as .*shared_experts"):
        load_policy(config)


# ---- the card ----


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_the_card_says_what_was_done(make_run, tmp_path, lora):
    run, _ = make_run(lora=lora)
    front, text = read_card(export_run(run, tmp_path / "out"))
    assert front["library_name"] == ("transformers" if lora is None else "peft")
    assert {"rlhf", "r2m", "rloo"} <= set(front["tags"])
    assert "base_model" not in front  # a folder, which the hub would not take
    assert "arxiv.org/abs/2601.22664" in text
    assert "| prompts | `owner/prompts:train` |" in text
    assert "3 of 3 rounds of 64 prompts x 8 responses: 1536 trajectories" in text
    assert "| `eval/judge` | 0.25 (1) | 0.5 (3) |" in text
    assert "| `policy/kl` | 0.01 (1) | 0.03 (3) |" in text
    assert "seconds" not in text
    assert "| `generation.temperature` | `0.7` |" in text
    assert "| `r2m.eps` | `0.01` |" in text
    assert f"r2m-kernels {__version__}, torch {torch.__version__}, transformers " in text
    assert str(tmp_path) not in text


def test_the_card_names_a_base_model_of_the_hub(tmp_path):
    config = R2MConfig(
        policy="owner/model", reward_model="owner/rm", r2m=dataclasses.replace(R2MConfig().r2m, feedback="none")
    )
    write_policy_card(tmp_path, config, [])
    front, text = read_card(tmp_path)
    assert (front["base_model"], front["base_model_relation"]) == ("owner/model", "finetune")
    assert (
        "Fine-tuned from `owner/model`, by RLOO against a reward model on `owner/rm`. The reward model is fixed."
        in text
    )
    assert "0 of 100 rounds" in text


# ---- mistakes ----


def test_what_a_run_does_not_hold_is_named(make_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.yaml; expected the output_dir of a run"):
        export_run(tmp_path / "none", tmp_path / "out")
    run, _ = make_run()
    with pytest.raises(FileNotFoundError, match=r"checkpoint '7' is not in .*; there are 1, 2, 3, last, best"):
        export_run(run, tmp_path / "out", checkpoint="7")
    (run / "policy").rename(run / "elsewhere")
    with pytest.raises(FileNotFoundError, match="its run has not ended; expected a checkpoint to be chosen"):
        export_run(run, tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(make_run, tmp_path, monkeypatch):
    run, _ = make_run()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_policy_card", interrupted)  # all but the card is written
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_not_written_to(make_run, tmp_path):
    run, _ = make_run()
    with pytest.raises(ValueError, match="is not empty; expected a new folder"):
        export_run(run, run)


def test_weights_of_another_policy_are_an_error(make_run, tmp_path):
    run, _ = make_run()
    tiny.policy(48).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="are not those of the policy"):
        export_run(run, tmp_path / "out", checkpoint="last")


def test_a_run_on_a_model_given_in_python_is_an_error(make_run, tmp_path):
    run, _ = make_run()
    (run / "config.yaml").write_text(config_to_yaml(R2MConfig()))
    with pytest.raises(ValueError, match="names no policy"):
        export_run(run, tmp_path / "out")


# ---- the hub ----


class FakeHub:
    """The calls of huggingface_hub.HfApi that the upload makes, on a hub that holds `repos` {id: private}."""

    def __init__(self, repos=()):
        self.repos, self.uploads = dict(repos), []

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        if repo_id in self.repos and not exist_ok:
            raise OSError("409: it exists")
        self.repos.setdefault(repo_id, bool(private))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def repo_info(self, repo_id):
        return type("RepoInfo", (), {"private": self.repos[repo_id]})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub({"me/public": False})
    monkeypatch.setattr("r2m.commands.export.HfApi", fake)
    return fake


def test_nothing_is_uploaded_unless_asked(make_run, tmp_path, hub):
    run, _ = make_run()
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"policy and reward model are in {tmp_path / 'out'}\n"
    assert hub.uploads == []


@pytest.mark.parametrize("private", [False, True])
def test_the_whole_folder_is_uploaded(make_run, tmp_path, hub, private):
    run, _ = make_run(lora=Lora(rank=2))
    arguments = ["--checkpoint", "best", "--push-to-hub", "new", *(["--private"] if private else [])]
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    assert "uploaded to https://huggingface.co/me/new" in result.stdout
    assert hub.repos["me/new"] == private
    ((repo, names),) = hub.uploads
    assert repo == "me/new"
    assert {
        "README.md",
        "adapter_model.safetensors",
        "tokenizer.json",
        "reward_model",
        "generation_config.json",
    } <= set(names)


def test_a_public_repository_is_no_place_for_what_is_to_be_private(tmp_path, hub):
    with pytest.raises(ValueError, match="me/public exists and is public"):
        push_to_hub(tmp_path, "me/public", private=True)
    assert hub.uploads == []


def test_names_that_only_this_machine_knows_are_warned_about(make_run, tmp_path, hub, caplog):
    run, _ = make_run(lora=Lora(rank=2))
    out = export_run(run, tmp_path / "out")
    caplog.clear()
    caplog.set_level(logging.WARNING, "r2m")
    push_to_hub(out, "me/new")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith(f"adapter_config.json: base_model_name_or_path is {tmp_path / 'base'}, a folder of this")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--private"], "--private is given without --push-to-hub"),
        (["--checkpoint", "9"], "checkpoint '9' is not in "),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(make_run, tmp_path, hub, arguments, message):
    run, _ = make_run()
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
