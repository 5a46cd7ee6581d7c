"""Hand-over of a trained policy: a folder, or a repository of the Hugging Face hub, that loads without r2m."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r2m.cards import write_policy_card
from r2m.config import Placement, R2MConfig, load_config
from r2m.method.reward_model import R2MRewardModel, saved_config
from r2m.models import is_local
from r2m.policy.load import load_policy, load_tokenizer
from r2m.progress import waiting
from r2m.runs.checkpoint import new_folder
from r2m.runs.folder import find_checkpoint, read_metrics

logger = logging.getLogger(__name__)


def export_run(run: str | Path, output: str | Path, *, checkpoint: str | None = None, merge: bool = False) -> Path:
    """Write policy, tokenizer, generation config, model card and, in `reward_model`, the reward model to `output`.

    run: the output_dir of a run that has ended, or with `checkpoint` ("last", "best" or a round) of any run.
    A reward model on a backbone of the hub names it; one on a local folder takes the backbone along.

    merge: put an adapter into the model below it. Embeddings that were tied are untied where the adapter moved one of
        them, and the config says so.

    An adapter is saved in float32, a whole model in the dtype of the checkpoint it started from; after full tuning
    `run/policy` has it in float32. The work is done in float32 (4 bytes of host memory a weight), and what was written
    is loaded again: its logits have to be the trained policy's. Raises FileNotFoundError for what `run` does not hold
    and ValueError for an `output` that is not empty, weights that are not those of the config's policy, or logits that
    differ; then nothing is left in `output`.
    """
    run, output = Path(run), Path(output)
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} holds no config.yaml; expected the output_dir of a run")
    with new_folder(output), waiting(f"exporting {run}"):
        return _export(run, output, checkpoint, merge)


def _export(run: Path, output: Path, checkpoint: str | None, merge: bool) -> Path:
    config, history = load_config(run / "config.yaml"), read_metrics(run)
    if not config.policy:
        raise ValueError(f"{run / 'config.yaml'} names no policy: the run was given a model, and which is not known")
    where: Any = {"revision": config.policy_revision, "trust_remote_code": config.trust_remote_code}
    dtype = AutoConfig.from_pretrained(config.policy, **where).dtype or torch.float32
    here = dataclasses.replace(config, placement=Placement(), precision="float32")  # on the CPU, whatever the run had
    policy: Any
    if checkpoint is None:
        source = run
        if not (run / "policy").is_dir():
            raise FileNotFoundError(f"{run} holds no policy, its run has not ended; expected a checkpoint to be chosen")
        policy, tokenizer = _load_saved(run / "policy", here), load_tokenizer(str(run / "policy"))
    else:
        source = find_checkpoint(run, checkpoint)
        history = [row for row in history if row["round"] <= int(source.name.rpartition("-")[2])]
        policy = _load_checkpoint(source / "policy.safetensors", here)
        tokenizer = load_tokenizer(config.policy, **where)
    expected = _logits(policy)
    if isinstance(policy, PeftModel) and merge:
        policy = _merged(policy)
        _check_logits(policy, expected, "the merged policy", "an export without --merge")
    if isinstance(policy, PeftModel):
        policy.active_peft_config.revision = config.policy_revision  # of the model that it is loaded onto
        below: Any = policy.get_base_model()
        below.generation_config.save_pretrained(output)
        policy.save_pretrained(str(output))
    else:
        for p in policy.parameters():
            p.data.copy_(p.to(dtype))  # a folder of `dtype` is compared with what that dtype leaves
        expected = _logits(policy)
        policy.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)
    advice = "--merge" if isinstance(policy, PeftModel) else "the checkpoint's own weights, policy.safetensors"
    loader: Any = AutoPeftModelForCausalLM if isinstance(policy, PeftModel) else AutoModelForCausalLM
    del policy
    exported = loader.from_pretrained(output, dtype=torch.float32, trust_remote_code=config.trust_remote_code)
    _check_logits(exported, expected, f"what {loader.__name__} loads from {output}", advice)
    del exported
    backbone = saved_config(source / "reward_model")
    if backbone is not None and is_local(backbone.backbone):  # which nobody else has: it goes along
        reward_model = R2MRewardModel.from_pretrained(
            source / "reward_model", dtype="auto", trust_remote_code=config.trust_remote_code
        )
        reward_model.save_pretrained(output / "reward_model", include_backbone=True)
    else:
        shutil.copytree(source / "reward_model", output / "reward_model")
    write_policy_card(output, config, history)
    return output


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload an exported folder to `repo` ("owner/name"), made if it is not there; returns its address.

    Raises ValueError if `private` is asked of a repository that exists and is public, before anything is uploaded.
    """
    _warn_about_local_names(Path(folder))
    api = HfApi()
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(url.repo_id).private:
        raise ValueError(f"{url.repo_id} exists and is public; expected a private repository, or a new name")
    with waiting(f"uploading {folder}"):
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Policy and reward model, by r2m export"
        )
    return str(url)


# ---- loading ----


def _load_saved(folder: Path, config: R2MConfig) -> PreTrainedModel | PeftModel:
    if config.lora is not None:
        lora = dataclasses.replace(config.lora, adapter=str(folder))
        return load_policy(dataclasses.replace(config, lora=lora))
    return load_policy(dataclasses.replace(config, policy=str(folder), policy_revision=None))


def _load_checkpoint(file: Path, config: R2MConfig) -> PreTrainedModel | PeftModel:
    policy, saved = load_policy(config), load_file(file)
    own = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in saved.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(f"the weights in {file} are not those of the policy {config.policy} of the run's config")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)
    return policy


def _merged(policy: PeftModel) -> PreTrainedModel:
    """The model with the adapter in its weights. A tied weight is read in two places and would take what the adapter
    has for one of them: both get their own, and are tied again if they are still equal."""
    model: Any = policy.get_base_model()
    tied = getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None
    if tied:
        head = model.get_output_embeddings()
        head = getattr(head, "base_layer", getattr(head, "original_module", head))  # below peft's layer
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model = policy.merge_and_unload()
    if tied:
        same = torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = same
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
    return model


@torch.no_grad()
def _logits(policy: Any) -> Tensor:
    """[1, 32, V] of tokens from all over the vocabulary."""
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    device = next(policy.parameters()).device
    ids = torch.linspace(0, vocabulary - 1, 32, device=device).long()[None]
    return policy.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


def _check_logits(policy: Any, expected: Tensor, what: str, advice: str) -> None:
    error, spread = (_logits(policy) - expected).abs().max().item(), expected.std().item()
    if not error <= 1e-2 * spread:  # NaN too
        raise ValueError(
            f"{what} is not the trained policy: its logits are off by {error:.3g}, where they spread by {spread:.3g}; "
            f"expected {advice}"
        )


def _warn_about_local_names(folder: Path) -> None:
    files = {"adapter_config.json": ["base_model_name_or_path"], "reward_model/r2m_config.json": ["backbone", "policy"]}
    for file, keys in files.items():
        names = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        for key in keys:
            if key in names and is_local(names[key]):
                logger.warning(
                    "%s: %s is %s, a folder of this machine; nobody else can load it from there", file, key, names[key]
                )
