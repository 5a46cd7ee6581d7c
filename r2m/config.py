"""One YAML file describes one run. Every key is a field below; an unknown key is an error that suggests the nearest
one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from r2m.algorithms import ALGORITHMS
from r2m.batching import Tokens
from r2m.names import check_columns, check_function, check_labeller, check_model, check_scores, check_source, named

_STRICT = ConfigDict(extra="forbid", revalidate_instances="always")
_Block = TypeVar("_Block")
_VALIDATORS: dict[type, Any] = {}


def _checked(cls: type[_Block]) -> type[_Block]:
    """A dataclass whose values are checked wherever they come from: a file, a call, `dataclasses.replace`, `=`.

    A mapping is taken for the block of keys that it describes. Raises ValueError, which names the key and its value.
    """
    check = _VALIDATORS[cls] = TypeAdapter(cls).validator

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **values: Any) -> None:
        with _explained(cls):
            check.validate_python(ArgsKwargs(args, values), self_instance=self)

    def assign(self: Any, name: str, value: Any) -> None:
        with _explained(cls):
            check.validate_assignment(self, name, value)

    cls.__init__, cls.__setattr__ = init, assign  # type: ignore[method-assign]
    return cls


def _at_least(key: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{key} is {value}; expected at least {least}")


@_checked
@dataclass
class Generation:
    """How responses are sampled. Nothing of the checkpoint's own generation defaults leaks in."""

    __pydantic_config__ = _STRICT
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted
    max_new_tokens: int = 512
    temperature: float = 0.7  # every logit (policy, old, reference) is divided by it
    eos_token_ids: list[int] | None = None  # None: those of the policy's checkpoint and tokenizer
    stop_strings: list[str] = field(default_factory=list)
    batch_size: int | None = None  # sequences generated at once; None: the whole round, prompts x K
    engine: Literal["transformers", "vllm"] = "transformers"  # vllm: in the trainer's process (r2m.integrations.vllm)
    server: str | None = None  # of vLLM, http://host:port, in place of an engine in the process
    # Largest weight of a token: the policy's probability of it over that of the engine that sampled it, where the
    # engine says so (r2m.policy.loss.importance_ratios)
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        _at_least("generation.batch_size", 1 if self.batch_size is None else self.batch_size, 1)
        if self.temperature <= 0:
            raise ValueError(f"generation.temperature is {self.temperature}; expected more than 0")
        if self.importance_cap < 1:
            raise ValueError(f"generation.importance_cap is {self.importance_cap}; expected at least 1")
        if self.server is not None:
            if self.engine != "vllm":
                raise ValueError(
                    f"generation.server is {self.server!r} with the engine {self.engine!r}; expected 'vllm'"
                )
            if not re.fullmatch(r"http://[^/:]+:\d+", self.server):
                raise ValueError(f"generation.server is {self.server!r}; expected http://host:port")

    @property
    def max_tokens(self) -> int:
        """The greatest length of a sequence, prompt and response."""
        return self.max_prompt_tokens + self.max_new_tokens


@_checked
@dataclass
class KL:
    """Penalty towards the frozen initial policy."""

    __pydantic_config__ = _STRICT
    beta: float = 0.05
    # "reward": r - beta * sequence KL, as TRL's RLOO; with reinforce++, which takes nothing else, in each token's
    # return
    placement: Literal["loss", "reward"] = "loss"
    estimator: Literal["k2", "k3"] = "k3"  # per token, for placement "loss"


@_checked
@dataclass
class Lora:
    """A low-rank adapter instead of full tuning."""

    __pydantic_config__ = _STRICT
    rank: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    top_layers: int | None = None  # adapt only the last so many layers
    adapter: str | None = None  # start from this saved adapter; the keys above are then ignored


@_checked
@dataclass
class R2M:
    """Policy feedback and the update of the reward model (method, equations 1-6)."""

    __pydantic_config__ = _STRICT
    # none: the fixed reward model; frozen: no update; head: no feedback (w = 1), GREBT trains phi alone, as the paper's
    # Iterative RM-head
    feedback: Literal["none", "frozen", "trained", "head"] = "trained"
    # Whose hidden states are the feedback: the policy's; for ablation those of its frozen start, or Gaussian noise with
    # the mean and variance of the policy's, per sequence and feature, drawn at every use (the paper's R2M w/ Noise).
    source: Literal["policy", "reference", "noise"] = "policy"
    floor: float = 0.6  # Omega: w(t) never falls below it
    alpha: float = 0.3  # (1 - alpha) BT + alpha GRE
    eps: float = 1e-2  # in z = (r - mean) / (std + eps); bounds the gradient at about 0.2 / eps
    pair_source: Literal["annotated", "recomputed"] = "annotated"
    positions: Literal["all", "response"] = "all"  # which hidden states; each sequence's last is never one of them
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    inner_width: int = 2048  # d, of a new cross-attention
    num_heads: int = 1
    standardize: bool = False  # RTE and hidden states per feature, statistics taken once, before training
    zero_output: bool = False  # start exactly at the vanilla reward model
    # Rewards are scaled to the spread, inside groups, of the initial head's scores of the same samples, as measured a
    # round before. GREBT widens its own margins, and kl.beta is a weight against the rewards' scale.
    scale_anchor: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"r2m.floor is {self.floor}; expected a value between 0 and 1")

    @property
    def attends(self) -> bool:
        """Whether rewards depend on hidden states; else they are the score at w = 1."""
        return self.feedback in ("frozen", "trained")

    @property
    def trains(self) -> bool:
        """Whether GREBT moves weights of the reward model."""
        return self.feedback in ("trained", "head")


@_checked
@dataclass
class Preferences:
    """Fresh labels: pairs of each round's responses, labelled while the run goes on (docs/labels.md)."""

    __pydantic_config__ = _STRICT
    # "module:function", "file.py:function", a command that reads and writes JSON lines, or "queue", a person by
    # `r2m label`; None: nobody is asked
    labeller: str | None = None
    per_round: int = 12  # pairs, one of each prompt before a second one of any
    # A prompt's pair: its best and worst response by the reward, the margin nearest to zero, the margin that the
    # policy feedback changes most, or any
    choose: Literal["best_worst", "uncertain", "disagreement", "random"] = "best_worst"
    weight: float = 1.0  # of the labels' Bradley-Terry loss
    noise: float = 0.0  # share of labels that are taken to be the wrong way round
    grebt: float = 1.0  # weight of GREBT beside it; 0: labels alone teach the reward model
    reservoir: int = 256  # labelled pairs that are learned from again, the last ones
    wait: float = 60.0  # seconds; labels that take longer are learned from in a later round

    def __post_init__(self) -> None:
        _at_least("preferences.per_round", self.per_round, 1)
        _at_least("preferences.reservoir", self.reservoir, 0)
        for name in ("weight", "grebt"):
            _at_least(f"preferences.{name}", getattr(self, name), 0)
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"preferences.noise is {self.noise}; expected at least 0 and less than 0.5")
        if not 0 <= self.wait < float("inf"):
            raise ValueError(f"preferences.wait is {self.wait}; expected seconds, 0 or more")
        if self.labeller is None and self.grebt != 1:
            raise ValueError(f"preferences.grebt is {self.grebt} without preferences.labeller; expected a labeller")


@_checked
@dataclass
class Evaluation:
    """Measurements on what training never sees, and samples in the log."""

    __pydantic_config__ = _STRICT
    every: int = 5  # rounds; also after the first and the last
    prompts: str = ""  # held-out prompts, one response each; "": none
    pairs: str = ""  # held-out human preferences: the reward model's accuracy on them; "": none
    columns: dict[str, str] | None = None  # of these prompts and pairs; None: the run's `columns`
    judge: str = ""  # "module:function" or "file.py:function", called with (prompts, responses), returns their scores
    stop_at_kl: float | None = None  # nats per response, mean over a round's samples; training ends with that round
    samples_every: int = 10  # rounds between tables of samples in the log; 0: none

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 1)
        check_columns("evaluation.columns", self.columns or {})


@_checked
@dataclass
class Checkpoints:
    """Saved states from which a run goes on as if nothing had happened."""

    __pydantic_config__ = _STRICT
    every: int = 10  # rounds; also after the last; 0: none but on SIGTERM
    keep: int = 2  # the newest ones; beside them the best by the judge

    def __post_init__(self) -> None:
        _at_least("checkpoints.every", self.every, 0)
        _at_least("checkpoints.keep", self.keep, 1)


@_checked
@dataclass
class Placement:
    """Where models lie, and in what form. Devices as PyTorch names them."""

    __pydantic_config__ = _STRICT
    device: str | None = None  # of the policy and all that trains; None: the GPU where there is one
    reward_model: str | None = None  # of the reward model's backbone; None: the policy's
    offload_reward_model: bool = False  # its backbone waits in host memory between its uses
    offload_reference: bool = False  # the reference waits in host memory between its uses; an adapter needs no copy
    shard_policy: bool = False  # each of several processes holds a part of the policy, its optimizer and reference
    timeout: float = 30  # minutes after which a process that waits for the others stops
    quantize_reward_model: Literal["8bit", "4bit"] | None = None  # of its backbone, by bitsandbytes
    # As transformers' attn_implementation: eager, sdpa, flash_attention_2, ..., a kernel of the hub; None: its choice
    attention: str | None = None


@_checked
@dataclass
class R2MConfig:
    """A training run. Batch sizes count sequences; lengths count tokens."""

    __pydantic_config__ = _STRICT
    policy: str = ""  # hub id or path
    policy_revision: str | None = None
    reward_model: str = ""  # a saved R2M reward model, or a sequence-classification checkpoint with one output
    reward_model_revision: str | None = None
    prompts: str = ""  # .jsonl, .csv, .txt, ... or a dataset of the Hugging Face hub (see r2m.load_prompts)
    columns: dict[str, str] = field(default_factory=dict)  # field -> its name in the data: {prompt: question}
    skip_invalid: bool = False  # leave out and count rows that are no prompt or pair, such as ties
    output_dir: str = "runs/r2m"
    seed: int = 0
    trust_remote_code: bool = False

    rounds: int = 100  # T
    prompts_per_round: int = 64  # n
    num_generations: int = 8  # K; 1 does where nothing compares the responses of a group
    algorithm: str = "rloo"  # or grpo, remax, reinforce++ (r2m.algorithms)
    epochs: int = 2  # k, passes of the policy over a round
    minibatches: int = 1  # optimizer steps per epoch
    # What runs at a time, by one of two keys: sequences in one forward pass, or tokens, padding included, of all passes
    # of a micro-batch. Neither: as many tokens as 8 sequences of the greatest length have.
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the rounds, of both learning rates
    warmup_rounds: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_range: float = 0.2
    missing_eos_penalty: float | None = None  # taken off the reward of a response that did not end by itself
    # Of the autocast region; trainable weights are float32. auto: bf16 where the device multiplies it natively (CUDA
    # from compute capability 8.0, CPUs with avx512_bf16, amx_bf16 or Arm's bf16), else float32.
    precision: Literal["auto", "bf16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)  # beside metrics.jsonl

    generation: Generation = field(default_factory=Generation)
    kl: KL = field(default_factory=KL)
    lora: Lora | None = None
    r2m: R2M = field(default_factory=R2M)
    preferences: Preferences = field(default_factory=Preferences)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round", "num_generations", "epochs", "minibatches"):
            _at_least(name, getattr(self, name), 1)
        for name in ("micro_batch_size", "micro_batch_tokens"):
            _at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size} and micro_batch_tokens {self.micro_batch_tokens}; "
                "expected one of them: sequences in a forward pass, or a budget of tokens"
            )
        check_columns("columns", self.columns)
        if self.algorithm not in ALGORITHMS:
            known = list(map(repr, ALGORITHMS))
            raise ValueError(f"algorithm: expected {', '.join(known[:-1])} or {known[-1]}; given {self.algorithm!r}")
        algorithm = ALGORITHMS[self.algorithm]
        comparing = [self.algorithm] * (algorithm.compares == "group") + ["GREBT"] * self.r2m.trains
        comparing += ["r2m.scale_anchor"] * self.r2m.scale_anchor
        if self.num_generations == 1 and comparing:
            raise ValueError(
                f"num_generations is 1; the responses of a group are compared by {' and '.join(comparing)}: "
                "expected at least 2"
            )
        if algorithm.kl_in_return and self.kl.placement == "loss":
            raise ValueError(
                f"kl.placement is 'loss'; {self.algorithm} has its KL in the return of each token: expected 'reward'"
            )
        if self.r2m.source != "policy" and not self.r2m.attends:
            raise ValueError(
                f"r2m.source is {self.r2m.source!r}, and r2m.feedback {self.r2m.feedback!r} uses no hidden states; "
                "expected feedback frozen or trained"
            )
        if self.r2m.scale_anchor and not self.r2m.attends:
            raise ValueError(
                f"r2m.scale_anchor is true, and r2m.feedback {self.r2m.feedback!r} uses no hidden states; "
                "expected feedback frozen or trained"
            )
        if self.preferences.labeller is not None:
            feedback, choose = self.r2m.feedback, self.preferences.choose
            if not self.r2m.trains:
                raise ValueError(
                    f"preferences.labeller is set, and r2m.feedback {feedback!r} learns nothing; expected trained or "
                    "head"
                )
            if choose == "disagreement" and not self.r2m.attends:
                raise ValueError(
                    f"preferences.choose is {choose!r}, and r2m.feedback {feedback!r} changes no margin; expected "
                    "feedback trained, or another choice"
                )
        if self.placement.shard_policy and self.placement.offload_reference:
            raise ValueError(
                "placement.shard_policy and placement.offload_reference are both true; expected one of them"
            )
        batch = self.prompts_per_round * self.num_generations
        if batch % self.minibatches:
            raise ValueError(
                f"minibatches is {self.minibatches}; "
                f"expected a divisor of prompts_per_round * num_generations = {batch}"
            )

    @property
    def sequences_at_once(self) -> int:
        """Generated at once, at most."""
        return self.generation.batch_size or self.prompts_per_round * self.num_generations

    @property
    def first_epoch(self) -> int:
        """0: a pass of its own scores, without gradient. 1: the first epoch scores.

        It can where an epoch has one optimizer step, so that it runs on the weights that sampled, and where each of its
        micro-batches knows its advantages.
        """
        compares = ALGORITHMS[self.algorithm].compares
        knows = compares == "none" or (compares == "group" and self.whole_groups)
        return 1 if self.minibatches == 1 and knows else 0

    @property
    def batch_size(self) -> int | Tokens:
        """What runs at a time: so many sequences, or a budget of tokens."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return Tokens(self.micro_batch_tokens or 8 * self.generation.max_tokens)

    @property
    def kept_together(self) -> int:
        """Sequences that share a micro-batch whatever their lengths: a group's, where the first epoch compares them."""
        compares = ALGORITHMS[self.algorithm].compares == "group"
        return self.num_generations if compares and self.first_epoch == 1 else 1

    @property
    def whole_groups(self) -> bool:
        """Whether micro-batches can be whole groups of responses to a prompt, whatever their lengths."""
        size = self.batch_size
        if isinstance(size, Tokens):
            return size.number >= self.num_generations * self.generation.max_tokens
        return size % self.num_generations == 0

    def check_processes(self, number: int) -> None:
        """Raises ValueError unless whole groups can be dealt to so many processes, the same to each, and none waits for
        a labeller longer than for another process."""
        share, rest = divmod(self.prompts_per_round, number)
        if rest:
            raise ValueError(
                f"prompts_per_round is {self.prompts_per_round} on {number} processes; expected a multiple of {number}"
            )
        if share * self.num_generations % self.minibatches:
            raise ValueError(
                f"minibatches is {self.minibatches} on {number} processes; expected a divisor of the "
                f"{share * self.num_generations} sequences of each"
            )
        if (
            number > 1
            and self.preferences.labeller is not None
            and self.preferences.wait >= 60 * self.placement.timeout
        ):
            raise ValueError(
                f"preferences.wait is {self.preferences.wait:g} seconds on {number} processes, which wait for one "
                f"another placement.timeout = {self.placement.timeout:g} minutes; expected less than that"
            )


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> R2MConfig:
    """A config from a YAML file and `key=value` overrides (dots reach into blocks: `r2m.floor=0.7`).

    Raises ValueError for an unknown key (with the nearest known one), a value of the wrong type, or a value out of
    range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.load(Path(path).read_text(), Loader=_YamlLoader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected a mapping of keys to values")
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"override {item!r}; expected key=value")
        *blocks, leaf = key.split(".")
        block = values
        for name in blocks:
            block[name] = block.get(name) or {}
            block = block[name]
            if not isinstance(block, dict):
                raise ValueError(f"override {item!r}: {name} is not a block of keys")
        block[leaf] = yaml.load(value, Loader=_YamlLoader)
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> R2MConfig:
    """The config that `values` (nested mappings) describe; raises ValueError as `load_config` does."""
    with _explained(R2MConfig):
        return _VALIDATORS[R2MConfig].validate_python(values)


def config_to_yaml(config: R2MConfig) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def require_keys(config: R2MConfig, *keys: str) -> None:
    """Raises ValueError for a key that is empty."""
    for key in keys:
        if not getattr(config, key):
            raise ValueError(f"{key} is not set; expected it in the config file or as {key}=...")


def check_names(config: R2MConfig, *, data: bool = True, head: bool = True) -> None:
    """Raises FileNotFoundError, ValueError or ImportError, naming the key and what it says, for a name that cannot be
    right: a path where nothing is, a `reward_model` without a scoring head. No hub is asked.

    data: also of prompts, pairs and judge, beside those of models. head: whether `reward_model` has to have one.
    """
    named("policy", check_model, config.policy)
    named("reward_model", check_model, config.reward_model)
    if head:
        named("reward_model", check_scores, config.reward_model)
    named("lora.adapter", check_model, (config.lora and config.lora.adapter) or "")
    if not data:
        return
    measured = config.evaluation
    if measured.judge and not measured.prompts:
        raise ValueError("evaluation.judge is set without evaluation.prompts; expected the held-out prompts for it")
    named("prompts", check_source, config.prompts)
    named("evaluation.prompts", check_source, measured.prompts)
    named("evaluation.pairs", check_source, measured.pairs, pairs=True)
    named("evaluation.judge", functools.partial(check_function, "judge"), measured.judge)
    named("preferences.labeller", check_labeller, config.preferences.labeller or "")


def config_items(config: R2MConfig) -> dict[str, Any]:
    """Every key and its value, those of blocks with a dot: {"seed": 0, "r2m.floor": 0.6, ...}."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in values.items():
            is_block = isinstance(value, dict) and key != "columns"
            items |= flat(value, f"{prefix}{key}.") if is_block else {prefix + key: value}
        return items

    return flat(dataclasses.asdict(config))


@contextmanager
def _explained(cls: type) -> Iterator[None]:
    """What is wrong with values of `cls`, in the words of the YAML file."""
    try:
        yield
    except ValidationError as error:
        block = [name for name, kind in _BLOCKS.items() if kind is cls]
        raise ValueError("\n".join(_explain(problem, block) for problem in error.errors())) from None


def _explain(problem: Any, block: list[str]) -> str:
    path = [*block, *(str(part) for part in problem["loc"])]
    if problem["type"] not in ("unexpected_keyword_argument", "extra_forbidden", "no_such_attribute"):
        where = ".".join(path)
        if problem["type"] == "value_error":  # of a __post_init__, which names the key
            return str(problem["ctx"]["error"])
        return f"{where}: {problem['msg']}; given {problem['input']!r}"
    known = _field_paths()
    # The right name may live in another block (`floor` for `r2m.floor`), so last names are candidates too.
    candidates = {path.rpartition(".")[2]: path for path in known} | {path: path for path in known}
    nearest = difflib.get_close_matches(".".join(path), candidates, n=1)
    hint = f"did you mean {candidates[nearest[0]]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(path)!r}; {hint}"


def _field_paths() -> list[str]:
    paths = []
    for item in dataclasses.fields(R2MConfig):
        inner = dataclasses.fields(_BLOCKS[item.name]) if item.name in _BLOCKS else ()
        paths += [item.name, *(f"{item.name}.{key.name}" for key in inner)]
    return paths


_BLOCKS: dict[str, Any] = {
    "generation": Generation, "kl": KL, "lora": Lora, "r2m": R2M, "preferences": Preferences,
    "evaluation": Evaluation, "checkpoints": Checkpoints, "placement": Placement,
}  # fmt: skip


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string; everyone who writes a learning rate means a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
