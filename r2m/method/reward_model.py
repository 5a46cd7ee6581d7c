"""The R2M reward model: a frozen language model, the cross-attention over policy feedback, and a linear head."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from r2m.batching import Tokens, longest_first, passes
from r2m.cards import classifier_card, classifier_usage, reward_model_card
from r2m.data.sources import Preference, Prompt, check_list
from r2m.data.tokenization import encode_whole, usable_pairs, usable_whole_pairs
from r2m.method.backbone import brought_to, hidden_width, load_classifier
from r2m.models import check_no_adapter, position_limit, sequence_classifier
from r2m.names import no_head
from r2m.progress import track
from r2m_kernels import (
    RewardHead,
    SequenceToTokenAttention,
    absorbed_query,
    attention_pool_with_gradient,
    reward_direction,
    reward_from_pools,
)

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "r2m_config.json", "r2m.safetensors"


@dataclass
class RewardModelConfig:
    """What `save_pretrained` writes beside the trained weights: everything needed to build the rest again."""

    backbone: str
    backbone_revision: str | None
    policy: str
    policy_revision: str | None
    policy_width: int  # D_p
    inner_width: int  # d
    num_heads: int
    floor: float  # Omega, the fusion weight outside training
    standardize: bool
    rte_token: str
    suffix: str
    max_length: int
    # Of the feedback that the cross-attention was fitted on, "all" or "response" (see rollout.collate); None: not
    # fitted yet, or saved before this was kept.
    positions: str | None = None

    def check_positions(self, positions: str) -> None:
        """Raises ValueError for a run with feedback of other positions."""
        if self.positions not in (None, positions):
            raise ValueError(
                f"r2m.positions is {positions!r}, and the reward model was fitted on {self.positions!r}; expected "
                f"r2m.positions={self.positions}, or a reward model fitted with --positions {positions}"
            )

    def __post_init__(self) -> None:
        if self.rte_token not in ("checkpoint", "last"):
            raise ValueError(f"rte_token is {self.rte_token!r}; expected 'checkpoint' or 'last'")
        check_weight("floor", self.floor)


class Absorbed(NamedTuple):
    """Equations 1-3 for one round, with the weights of the cross-attention absorbed into two vectors (see
    r2m_kernels)."""

    rte: Tensor  # [B, D_rm], standardised where the model is
    query: Tensor  # u [B, D_p] or [B, H, D_p]
    direction: Tensor  # g [D_p] or [H, D_p]
    bias: Tensor  # [1]


class R2MRewardModel(nn.Module):
    """Reward `r = phi . ((1 - w) A + w H) + b` (equations 1-3) with a frozen backbone.

    Trainable, float32: `attention` (W_q, W_k, W_v, W_o) and `head` (phi, b). The backbone is in eval mode, runs without
    gradient and is no submodule: neither `parameters()` nor `state_dict()` nor `train()` reaches it. It may lie on a
    device of its own, or wait in host memory between its uses; `.to()` moves it only where it follows the rest.

    backbone_device: where the backbone runs; None: with the trainable part.
    offload: the backbone, given in host memory, waits there; see `backbone_loaded`.

    head_is_new: whether the head is random, as on a causal LM, until `r2m.fit_reward` has fitted it; `R2MTrainer` and
        `R2MUpdater` then raise ValueError. Set it to False for a head that got its weights otherwise.
    """

    head_is_new = False

    # Standardisation of RTEs [D_rm] and hidden states [D_p]; 0 and 1 where there is none.
    rte_mean: Tensor
    rte_scale: Tensor
    feedback_mean: Tensor
    feedback_scale: Tensor

    def __init__(
        self,
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardModelConfig,
        *,
        backbone_device: torch.device | str | None = None,
        offload: bool = False,
    ):
        super().__init__()
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"reward_model {config.backbone}: its head is {score!r}; "
                "expected a linear layer `score` with one output"
            )
        self.config = config
        self.tokenizer = tokenizer
        classifier.eval().requires_grad_(False)
        self._frozen = (classifier,)  # in a tuple: out of nn.Module's sight
        self._backbone_device = None if backbone_device is None else torch.device(backbone_device)
        self.offload = offload
        self._rule_pad_id = getattr(classifier.config.get_text_config(), "pad_token_id", None)
        width = score.in_features
        self.attention = SequenceToTokenAttention(
            width, config.policy_width, config.inner_width, num_heads=config.num_heads
        )
        self.head = RewardHead(width)
        with torch.no_grad():
            self.head.weight.copy_(score.weight[0])
            self.head.bias.copy_(score.bias[0] if score.bias is not None else torch.zeros(()))
        for name, size in (("rte", width), ("feedback", config.policy_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.to(score.weight.device)

    # ---- loading and saving ----

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        policy: str | Path | PreTrainedModel | None = None,
        revision: str | None = None,
        policy_revision: str | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        device: torch.device | str = "cpu",
        backbone_device: torch.device | str | None = None,
        offload: bool = False,
        quantization: Literal["8bit", "4bit"] | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
        inner_width: int = 2048,
        num_heads: int = 1,
        floor: float = 0.6,
        standardize: bool = False,
        zero_output: bool = False,
        rte_token: str = "checkpoint",
        suffix: str = "",
        max_length: int | None = None,
        positions: Literal["all", "response"] | None = None,
    ) -> R2MRewardModel:
        """A saved R2M reward model, or a new one on a sequence-classification checkpoint or causal LM.

        name: a folder or hub id. If it holds an R2M reward model, that is loaded with the backbone it names, and the
            arguments that describe a new one are ignored.
        policy: the model whose hidden states are the feedback, loaded or by name; needed for a new reward model.
        dtype: of the frozen backbone. None: bfloat16 where its device multiplies it natively, else float32
            (`r2m.devices.compute_dtype`); "auto": as it is stored.
        device: of the trainable part, the policy's; `backbone_device`: of the backbone, by default the same.
        offload: the backbone waits in host memory and comes to its device for `embed` alone.
        quantization: of the backbone's linear layers by bitsandbytes; a quantised backbone stays where it was loaded.
        attention: of the backbone, as transformers' attn_implementation ("eager", "sdpa", ...); None: its choice.
        rte_token: "checkpoint" reads the RTE where the checkpoint's own head does, the rightmost token that is not its
            padding token (where that is also the end-of-sequence token: the token before it); "last" reads the last
            token.
        suffix: put behind every text prompt and completion, such as words that make a plain language model's last token
            say what it thinks of the text; chat messages have the template for that.
        max_length: in tokens of the reward model's tokenizer; longer texts lose their beginning. None: 2048, or as many
            as the backbone has positions.
        positions: whose hidden states a fit uses, prompt and response ("all", also if None) or the "response".

        A causal LM gets a random head (`head_is_new`), which has to be fitted (`r2m.fit_reward`) before a run takes it.
        Raises ValueError for a head that is not linear with one output, for a policy of another width, for an adapter
        in place of a whole model, and for a max_length above the backbone's positions; ImportError where quantization
        finds no bitsandbytes.
        """
        if rte_token not in ("checkpoint", "last"):
            raise ValueError(f"rte_token is {rte_token!r}; expected 'checkpoint' or 'last'")
        if positions not in (None, "all", "response"):
            raise ValueError(f"positions is {positions!r}; expected 'all' or 'response'")
        if offload and quantization is not None:
            raise ValueError(f"offload is True with quantization {quantization!r}; a quantised backbone cannot move")
        saved = saved_config(name, revision)
        if saved is not None:
            config = saved
        elif policy is None:
            raise ValueError(f"policy is None; expected the model whose hidden states {name} will attend to")
        else:
            check_no_adapter("reward_model", name, revision)
            config = RewardModelConfig(
                backbone=_lasting(name),
                backbone_revision=revision,
                policy=_lasting(policy.config._name_or_path if isinstance(policy, nn.Module) else policy),
                policy_revision=policy_revision,
                policy_width=hidden_width(policy, policy_revision, trust_remote_code),
                inner_width=inner_width,
                num_heads=num_heads,
                floor=floor,
                standardize=standardize,
                rte_token=rte_token,
                suffix=suffix,
                max_length=2048 if max_length is None else max_length,
                positions=positions,
            )
        runs_on = device if backbone_device is None else backbone_device
        where: Any = {"revision": config.backbone_revision, "trust_remote_code": trust_remote_code}
        try:
            classifier, head_is_new = load_classifier(
                config.backbone, runs_on, dtype=dtype, quantization=quantization, attention=attention, **where
            )
        except ValueError as error:
            raise ValueError(f"reward_model {name}: {error}") from None
        limit = position_limit(classifier)
        if limit is not None and config.max_length > limit:
            if saved is None and max_length is not None:
                raise ValueError(
                    f"max_length is {max_length}; expected at most {limit}, the positions of reward_model {name}"
                )
            if saved is not None:
                logger.warning("%s: max_length %d is lowered to its %d positions", name, config.max_length, limit)
            config = replace(config, max_length=limit)
        if quantization is None and not offload:
            classifier.to(runs_on)
        tokenizer = AutoTokenizer.from_pretrained(config.backbone, **where)
        model = cls(classifier, tokenizer, config, backbone_device=backbone_device, offload=offload).to(device)
        if zero_output:
            nn.init.zeros_(model.attention.w_o)
        model.head_is_new = saved is None and head_is_new
        if saved is not None:
            weights: Any = cached_file(str(name), WEIGHTS_FILE, revision=revision)
            model.load_state_dict(load_file(weights))
            if policy is not None:
                model.check_policy_width(hidden_width(policy, policy_revision, trust_remote_code))
        return model

    def save_pretrained(self, folder: str | Path, include_backbone: bool = False) -> None:
        """Write the trained part (safetensors), its config with the names of backbone and policy, and a model card.

        include_backbone: the folder also becomes the sequence-classification checkpoint of `save_classifier`, and this
            model's backbone: it then needs no other file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config, note = self.config, ""
        if include_backbone:
            self.save_classifier(folder)
            rte_token = "last" if self._rule_pad_id is None else config.rte_token  # what it was without padding token
            config = replace(config, backbone=".", backbone_revision=None, rte_token=rte_token)
            note = self._usage()
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")
        (folder / "README.md").write_text(reward_model_card(asdict(self.config)) + note)

    @torch.no_grad()
    def save_classifier(self, folder: str | Path) -> None:
        """Write backbone and head as a sequence-classification checkpoint with tokenizer and model card.

        `AutoModelForSequenceClassification.from_pretrained(folder)` then gives the score at w = 1 up to a constant:
        standardisation is folded into the head's weight, and a head without bias, as transformers makes them, loses
        the shift. The padding token is one that makes its rule read the token this model reads, where there is one.
        Raises ValueError for a quantised backbone.
        """
        if self.is_quantized:
            raise ValueError(f"the backbone {self.config.backbone} is quantised; only one in full precision is saved")
        classifier, tokenizer, pad_id = self._classifier, copy.deepcopy(self.tokenizer), self._padding_id()
        weight, shift = self._folded_head()
        classifier.score.weight.copy_(weight[None])
        if classifier.score.bias is not None:
            classifier.score.bias.copy_(shift[None])
        if pad_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        text_config = classifier.config.get_text_config()
        text_config.pad_token_id = pad_id
        classifier.save_pretrained(folder)
        text_config.pad_token_id = self._rule_pad_id
        tokenizer.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(classifier_card(asdict(self.config)) + self._usage())

    def _folded_head(self) -> tuple[Tensor, Tensor]:
        """Weight [D_rm] and bias (0-dim) of the score at w = 1 on RTEs as they are, without standardisation."""
        weight = self.head.weight / self.rte_scale
        return weight, self.head.bias[0] - weight @ self.rte_mean

    def _padding_id(self) -> int | None:
        """A padding token with which the rightmost token that is no padding is the one read here."""
        if self.config.rte_token == "checkpoint" and self._rule_pad_id is not None:
            return self._rule_pad_id
        tokenizer = self.tokenizer
        ends = {self.encode("a", "b")[-1]}
        if tokenizer.chat_template is not None:
            ends.add(self.encode([{"role": "user", "content": "a"}], "b")[-1])
        special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        known = [token for token in special if token is not None]
        return next((token for token in known if token not in ends), known[0] if known else None)

    def _usage(self) -> str:
        """The model card's part on the sequence-classification checkpoint: what its plain loaders do not know."""
        config, pad_id = self.config, self._padding_id()
        pad = None if pad_id is None else self.tokenizer.convert_ids_to_tokens(pad_id)
        shift = 0.0 if self._classifier.score.bias is not None else self._folded_head()[1].item()
        if pad is None:
            read = "the last token, one text at a time, since the tokenizer has no padding token"
        else:
            read = f"the rightmost token that is not its padding, `{pad}`"
            if config.rte_token == "last" or self._rule_pad_id is None:
                read += "; the R2M loader reads the last token, whatever it is"
        loader = "AutoModelForSequenceClassification.from_pretrained(folder)`, and so TRL's `reward_funcs=folder"
        backbone_config = self._classifier.config
        if sequence_classifier(backbone_config) is not AutoModelForSequenceClassification:  # transformers has no class
            loader = "r2m.models.sequence_classifier(AutoConfig.from_pretrained(folder)).from_pretrained(folder)"
        return classifier_usage(
            loader=loader,
            shift=f" less {shift:.6g}, for its head has no bias" if shift else "",
            suffix=f"{json.dumps(config.suffix)}, behind every text that is no chat" if config.suffix else "none",
            read=read,
            max_length=config.max_length,
            dtype=str(self.backbone.dtype).removeprefix("torch."),
        )

    def check_head(self) -> None:
        """Raises ValueError while the head is random."""
        if self.head_is_new:
            raise ValueError(
                f"reward_model: {no_head(f'{self.config.backbone} is no sequence-classification checkpoint')}"
            )

    def check_policy_width(self, width: int) -> None:
        if width != self.config.policy_width:
            raise ValueError(
                f"reward_model attends to hidden states of width {self.config.policy_width} "
                f"(policy {self.config.policy}); the policy given has width {width}"
            )

    # ---- where the backbone lies ----

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self._classifier, self._classifier.base_model_prefix)

    @property
    def _classifier(self) -> Any:
        return self._frozen[0]

    @property
    def is_quantized(self) -> bool:
        return getattr(self._classifier, "is_quantized", False)

    def _apply(self, fn: Any, recurse: bool = True) -> R2MRewardModel:
        if self._backbone_device is None and not self.offload and not self.is_quantized:
            self._classifier._apply(fn, recurse)  # .to(device) reaches the backbone too
        return super()._apply(fn, recurse)

    @contextmanager
    def backbone_loaded(self) -> Iterator[None]:
        """Keep an offloaded backbone on the device it runs on; without offloading, or when already there, a no-op.

        `embed` enters it by itself; around several calls it saves the transfers between them. On leaving, the weights
        in host memory take their place again: what was written to the others is lost.
        """
        device = self._backbone_device or self.head.weight.device
        if not self.offload or device.type == "cpu" or self.backbone.device.type != "cpu":
            yield
            return
        with brought_to(self.backbone, device):
            yield

    # ---- the reward token embedding ----

    def embed(self, prompts: list[Prompt], completions: list[str], *, batch_size: int | Tokens = 32) -> Tensor:
        """Reward token embeddings H: [B, D_rm] float32, from the reward model's own tokenizer and chat template.

        A prompt of chat messages goes through the template with the completion as the assistant's turn; a text prompt
        is continued by the completion and the config's suffix as they are (`r2m.data.tokenization.encode_whole`). The
        backbone runs on its own device, the result is on the head's. batch_size: texts in one pass, or
        `r2m.batching.Tokens`, a budget; those of like length share one. Raises ValueError for messages that the
        template refuses.
        """
        check_list("prompts", prompts, "load_prompts")
        check_list("completions", completions)
        return self.embed_tokens(self._encode(prompts, completions), batch_size=batch_size)

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """The tokens of which `embed` makes an RTE: at most `max_length`, the last ones."""
        return self._encode([prompt], [completion])[0]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise ValueError, naming model and roles, where the chat template refuses a response to such messages.

        Of the conversations with the same roles in the same order, one is tried.
        """
        by_roles = {tuple(m["role"] for m in prompt): prompt for prompt in prompts if not isinstance(prompt, str)}
        for prompt in by_roles.values():
            self.encode(prompt, "a")

    def usable_pairs(
        self,
        pairs: Sequence[Preference],
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: nn.Module | None = None,
    ) -> Sequence[Preference]:
        """The pairs whose texts have at most `max_length` tokens, here and, given its tokenizer, for the policy, and no
        more than the policy, if given, has positions.

        A warning counts the others. Raises ValueError if none is left, or if the template refuses one.
        """
        limit = self.config.max_length
        kept = usable_whole_pairs(self.tokenizer, pairs, limit, suffix=self.config.suffix)
        if tokenizer is None:
            return kept
        positions = None if policy is None else position_limit(policy)
        return usable_pairs(tokenizer, kept, min(limit, positions or limit))

    def _encode(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        try:
            rows = encode_whole(self.tokenizer, prompts, completions, suffix=self.config.suffix)
        except ValueError as error:
            raise ValueError(f"reward_model: {error}") from None
        return [ids[-self.config.max_length :] for ids in rows]

    @torch.no_grad()
    def embed_tokens(self, rows: list[list[int]], *, batch_size: int | Tokens = 32) -> Tensor:
        """RTEs [B, D_rm] float32 of texts that `encode` has tokenised."""
        lengths = [len(row) for row in rows]
        order = longest_first(lengths)
        batches = passes([lengths[i] for i in order], batch_size)
        with self.backbone_loaded():
            parts = [self.run_backbone([rows[order[i]] for i in batch]) for batch in track(batches, "embedding, batch")]
        rte = torch.cat(parts)
        return torch.empty_like(rte).index_copy_(0, torch.tensor(order, device=rte.device), rte)

    def run_backbone(self, rows: list[list[int]]) -> Tensor:
        """RTEs [B, D_rm] float32 of one batch, differentiable where the backbone is."""
        width = max(map(len, rows))
        device = self.backbone.device
        # Any id will do for padding behind an explicit mask, so a tokenizer without a padding token needs none.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        hidden = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        o_token = torch.tensor([self._rte_position(row) for row in rows], device=device)
        return hidden[torch.arange(len(rows), device=device), o_token].float().to(self.head.weight.device)

    def _rte_position(self, row: list[int]) -> int:
        if self.config.rte_token == "last" or self._rule_pad_id is None:
            return len(row) - 1
        return max((i for i, token in enumerate(row) if token != self._rule_pad_id), default=0)

    # ---- equations 1-3 ----

    def vanilla_score(self, rte: Tensor) -> Tensor:
        """The score at w = 1, the checkpoint's own: rte [B, D_rm] -> [B] float32."""
        return self.head(self.standardized(rte))

    def score(
        self,
        rte: Tensor,
        hidden: Tensor,
        *,
        weight: float | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Rewards with policy feedback, differentiable in the trainable part.

        rte [B, D_rm] from `embed`; hidden [B, S, D_p] with mask bool [B, S], or packed [total, D_p] with cu_seqlens
        int32 [B + 1]; weight: the fusion weight w, by default Omega (t = T). Returns float32 [B]. One read of `hidden`.
        """
        weight = self.config.floor if weight is None else weight
        absorbed = self.absorb(rte, weight)
        query, direction = absorbed.query.detach(), absorbed.direction.detach()
        pooled, gradient, lse = attention_pool_with_gradient(
            query, hidden, direction, cu_seqlens=cu_seqlens, mask=mask, scale=1.0
        )
        return self.reward(absorbed, pooled, gradient, weight, lse=lse)

    def absorb(self, rte: Tensor, weight: float) -> Absorbed:
        """u, g and b (method of `r2m_kernels.policy_feedback_reward`), once per round, differentiable.

        Hidden states stay raw: their standardisation `(h - mean) / scale` is part of u and g, and of b where the
        softmax does not cancel it. A sequence without hidden states has no such part: its A is 0, as without
        standardisation. Raises ValueError for a weight outside [0, 1].
        """
        direction, bias = self.direction(weight)
        rte = self.standardized(rte)
        query = absorbed_query(rte, self.attention.w_q, self.attention.w_k, num_heads=self.config.num_heads)
        return Absorbed(rte, query / self.feedback_scale, direction, bias)

    def direction(self, weight: float) -> tuple[Tensor, Tensor]:
        """g and b of `absorb`. Raises ValueError for a weight outside [0, 1]."""
        check_weight("weight", weight)
        attention, heads = self.attention, self.config.num_heads
        direction = reward_direction(attention.w_v, attention.w_o, self.head.weight, weight=weight, num_heads=heads)
        direction = direction / self.feedback_scale
        return direction, self.head.bias - (direction * self.feedback_mean).sum()

    def reward(
        self, absorbed: Absorbed, pooled: Tensor, gradient: Tensor, weight: float, *, lse: Tensor | None = None
    ) -> Tensor:
        """Rewards [B] from what `attention_pool_with_gradient` returns, differentiable through `absorbed`.

        lse [B] or [B, heads] tells sequences without hidden states; None: all have some.
        """
        check_weight("weight", weight)
        rte, query, direction, bias = absorbed
        rewards = reward_from_pools(query, direction, pooled, gradient, rte, self.head.weight, bias, weight=weight)
        return rewards if lse is None else rewards - torch.where(without_feedback(lse), bias - self.head.bias, 0)

    # ---- standardisation ----

    def standardized(self, rte: Tensor) -> Tensor:
        return (rte - self.rte_mean) / self.rte_scale

    @property
    def needs_statistics(self) -> bool:
        return self.config.standardize and bool(torch.all(self.rte_scale == 1))

    @torch.no_grad()
    def set_statistics(self, rte: Tensor, feedback_mean: Tensor, feedback_scale: Tensor) -> None:
        """Fix the per-feature statistics that standardise RTEs (rows of `rte` [N, D_rm]) and hidden states [D_p].

        The head is rewritten for standardised RTEs, so that the score at w = 1 stays what it was. Raises ValueError for
        a single RTE, which has no deviation.
        """
        if len(rte) < 2:
            raise ValueError(f"rte has {len(rte)} rows; expected those of at least 2 texts to standardise by")
        mean, scale = rte.mean(0), rte.std(0).clamp_min(1e-6)
        self.head.bias.add_((mean - self.rte_mean) / self.rte_scale @ self.head.weight)
        self.head.weight.mul_(scale / self.rte_scale)
        self.rte_mean.copy_(mean)
        self.rte_scale.copy_(scale)
        self.feedback_mean.copy_(feedback_mean)
        self.feedback_scale.copy_(feedback_scale.clamp_min(1e-6))


def without_feedback(lse: Tensor) -> Tensor:
    """Sequences [B] that attend to no position, by their log-sum-exp [B] or [B, heads]; NaN is none of them."""
    return (lse if lse.ndim == 1 else lse[:, 0]).isneginf()


def check_weight(name: str, weight: float) -> float:
    """The fusion weight. Raises ValueError for one outside [0, 1], NaN among them."""
    if not 0 <= weight <= 1:
        raise ValueError(f"{name} is {weight}; expected a value between 0 and 1")
    return weight


def saved_config(name: str | Path, revision: str | None = None) -> RewardModelConfig | None:
    """The config of the R2M reward model in a folder or under a hub id; None where there is another model, or none."""
    file = cached_file(str(name), CONFIG_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    config = RewardModelConfig(**json.loads(Path(file).read_text()))
    return replace(config, backbone=_lasting(name), backbone_revision=revision) if config.backbone == "." else config


def _lasting(name: str | Path) -> str:
    """A name that means the same from every working directory."""
    return str(Path(name).absolute()) if Path(name).is_dir() else str(name)
