"""Per round: score the policy's samples with its feedback, then train the reward model's small part once (GREBT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m import processes
from r2m.config import R2M
from r2m.method.hidden_states import noise_like
from r2m.method.reward_model import R2MRewardModel, without_feedback
from r2m_kernels import attention_pool_dot, attention_pool_with_gradient, grebt_loss, time_weight

Rows = slice | list[int] | Tensor  # sequences of the round in one pass


class Kept(NamedTuple):
    """Of what later margins of m pairs are made (`R2MUpdater.margins`): 2 (D_rm + D_p) float32 a pair, for one head.

    The pools of a pair enter its margin by their difference. The slopes enter by what W_q and W_k have moved since, so
    bfloat16 will do. Without hidden states (settings.feedback "head") all but `rte` are empty: [m, 0].
    """

    rte: Tensor  # [m, 2, D_rm] float32, standardised where the model is: of the first response, of the second
    pooled: Tensor  # c of the first less that of the second, [m, D_p] or [m, H, D_p] float32
    slope: Tensor  # V / (1 - w) of either, [m, 2, H, D_p] bfloat16: d(g . c)/d(W_k^T W_q H / sqrt(d / H)) at w = 0
    level: Tensor  # slope . u when the pools were made, the first's less the second's, [m] float32
    offset: Tensor  # 1, 0 or -1, [m]: whether the first has hidden states, less whether the second has


class R2MUpdater:
    """Steps 3 and 5 of a training round, on hidden states that are streamed and never kept.

        updater.begin_round(rte, step)                      # rte [n * K, D_rm], prompt-major
        for rows in micro_batches:                          # scoring pass of the policy
            rewards[rows] = updater.score(rows, hidden, mask)
        for rows in micro_batches:                          # last epoch of the policy
            updater.collect(rows, hidden, mask)
        metrics = updater.step(rewards)                     # pairs, GREBT, one optimizer step

    Labels of pairs are learned from in the same step: `kept = updater.keep(pairs)` before it, and then
    `updater.step(rewards, labels_loss)` with a loss of `updater.margins(kept)`, of this round or an earlier one.

    `hidden` [b, S, D_p] goes through one read in either pass; `collect` keeps two float32 vectors of width D_p a
    sequence.

    The pools of a round are made with `query`, u [n * K, D_p] or [n * K, H, D_p], and `direction`, g [D_p] or [H, D_p],
    both float32 without gradient. Where that is done elsewhere, `score_pools` and `collect_pools` take the pools.

    settings.feedback: "frozen": `step` measures and changes nothing. "head": there are no hidden states, so `score` and
        `collect` are not called; rewards are `reward_model.vanilla_score(rte)`, and `step` trains phi alone.
    settings.scale_anchor: `score` multiplies rewards by `scale`, which `step` sets for the next round.
    settings.source: "noise": `score` and `collect` put noise in place of `hidden`. "reference": `hidden` is to be the
        reference's, in both.
    """

    def __init__(self, reward_model: R2MRewardModel, settings: R2M, *, total_steps: int, num_generations: int):
        if settings.scale_anchor and (num_generations == 1 or not settings.attends):
            raise ValueError(
                f"settings.scale_anchor is True with feedback {settings.feedback!r} and num_generations "
                f"{num_generations}; expected feedback frozen or trained and at least 2 responses to compare"
            )
        reward_model.check_head()
        head_alone = settings.feedback == "head"
        reward_model.config.floor = 1.0 if head_alone else settings.floor  # what w(t) will have been at t = T
        if settings.attends:
            reward_model.config.check_positions(settings.positions)
            reward_model.config.positions = settings.positions  # what the attention is trained on from now on
        self.reward_model = reward_model
        self.settings = settings
        self.total_steps = total_steps
        self.num_generations = num_generations
        self.scale = 1.0
        self._initial_weight: Tensor | None = None
        # GREBT does not see a shift of all rewards: the bias would follow rounding noise, which Adam scales up.
        candidates = reward_model.head.parameters() if head_alone else reward_model.parameters()
        trained = [p for p in candidates if p is not reward_model.head.bias]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=trained[0].is_cuda or None,  # as the policy's
        )

    @torch.enable_grad()  # scoring runs without gradient; `step` needs the graph that is made here
    def begin_round(self, rte: Tensor, step: int) -> None:
        """Fix w(t) (equation 2) and absorb the weights for every sequence. rte [n * K, D_rm]; step t in 1..T."""
        self._rte = rte
        if not self.settings.attends:
            return
        self.weight = time_weight(step, self.total_steps, self.settings.floor)
        self._absorbed = self.reward_model.absorb(rte, self.weight)
        # What the kernels read; the graph behind `absorbed` waits for `step`.
        self.query, self.direction = self._absorbed.query.detach(), self._absorbed.direction.detach()
        with torch.no_grad():
            self._vanilla = self._absorbed.rte @ self.reward_model.head.weight  # phi . H [B]
            self._offset = self._absorbed.bias - self.reward_model.head.bias
            if self.settings.scale_anchor:
                if self._initial_weight is None:
                    self._initial_weight = self.reward_model.head.weight.clone()
                self._initial = self._absorbed.rte @ self._initial_weight
        shape = self.query.shape
        self._feedback_value = self._vanilla.new_full(shape[:1], torch.nan)  # (1 - w) phi . A
        self._pooled = self.query.new_empty(shape)
        self._gradient = self.query.new_empty(shape)
        self._lse = self.query.new_empty(shape[:-1])
        self._collected = torch.zeros(shape[0], dtype=torch.bool, device=self.query.device)

    @torch.no_grad()
    def score(self, rows: Rows, hidden: Tensor, mask: Tensor) -> Tensor:
        """Rewards float32 [b] of the sequences `rows`, for hidden [b, S, D_p] and mask bool [b, S] (True = attend)."""
        hidden = self._feedback(hidden, mask)
        value, lse = attention_pool_dot(self.query[rows], hidden, self.direction, mask=mask, scale=1.0)
        return self._fused(rows, value, lse)

    @torch.no_grad()
    def score_pools(self, rows: Rows, pooled: Tensor, lse: Tensor) -> Tensor:
        """`score` where the pools were made elsewhere: pooled [b, D_p] or [b, H, D_p], lse [b] or [b, H]."""
        return self._fused(rows, (pooled * self.direction).sum(-1), lse)

    def _fused(self, rows: Rows, value: Tensor, lse: Tensor) -> Tensor:
        """Rewards [b] from g . c, `value` [b] or [b, H]."""
        value = value.sum(-1) if value.ndim == 2 else value  # heads
        self._feedback_value[rows] = (value + self._offset).masked_fill(without_feedback(lse), 0)
        fused = self._feedback_value[rows] + self.weight * self._vanilla[rows] + self.reward_model.head.bias
        return self.scale * fused

    @torch.no_grad()
    def collect(self, rows: Rows, hidden: Tensor, mask: Tensor) -> None:
        """Keep the pool of each sequence and its gradient, from the hidden states of the last policy epoch."""
        hidden = self._feedback(hidden, mask)
        pooled, gradient, lse = attention_pool_with_gradient(
            self.query[rows], hidden, self.direction, mask=mask, scale=1.0
        )
        self.collect_pools(rows, pooled, gradient, lse)

    def collect_pools(self, rows: Rows, pooled: Tensor, gradient: Tensor, lse: Tensor) -> None:
        """`collect` where the pools were made elsewhere, as by `attention_pool_with_gradient` with `query`."""
        self._pooled[rows], self._gradient[rows], self._lse[rows] = pooled, gradient, lse
        self._collected[rows] = True

    @torch.no_grad()
    def keep(self, pairs: Sequence[tuple[int, int]]) -> Kept:
        """What later margins of pairs of the round need, all collected: (first, second), rows of one prompt.

        Of several processes each gives the same pairs, by rows as `processes.gather` orders them, and gets all of them;
        nothing else is sent. Raises RuntimeError if a sequence was not collected.
        """
        rows = [row for pair in pairs for row in pair]
        where, own = processes.own_rows(rows, self.num_generations)
        parts = [self.reward_model.standardized(self._rte[own])]
        if self.settings.attends:
            self._check_collected()
            scale = self.reward_model.feedback_scale  # a part of u
            # V grows with 1 - w, which is near 0 in the first rounds; at w = 1 it is 0 in all.
            slope = (self._gradient[own] / (scale * ((1 - self.weight) or 1.0))).bfloat16().to(scale)
            level = (slope * (self.query[own] * scale)).flatten(1).sum(-1)
            parts += [self._pooled[own], slope, level, (~without_feedback(self._lse[own])).to(level)]
        parts = [processes.merge_rows(part, where, len(rows)).unflatten(0, (len(pairs), 2)) for part in parts]
        if not self.settings.attends:
            return Kept(parts[0], *[parts[0].new_empty(len(pairs), 0)] * 4)
        rte, pooled, slope, level, attended = parts
        slope = slope.bfloat16().view(*slope.shape[:2], self.reward_model.config.num_heads, slope.shape[-1])
        return Kept(rte, _difference(pooled), slope, _difference(level), _difference(attended))

    def margins(self, kept: Kept) -> Tensor:
        """Rewards [m] of the first of kept pairs less those of the second, by the weights as they are now and this
        round's w, differentiable in them.

        Exact in W_v, W_o, the head and w. What W_q and W_k have moved since the pools were made, moves u: the margins
        follow to first order, g . c + V . (u - u then), for V = d(g . c)/du (method of
        `r2m_kernels.reward_from_pools`). Not multiplied by `scale`, as GREBT's rewards are not.
        """
        vanilla = self.vanilla_margins(kept)
        if not self.settings.attends:
            return vanilla
        model, (rte, pooled, slope, level, offset) = self.reward_model, kept
        w_q, w_k = (weight.unflatten(0, (slope.shape[2], -1)) for weight in (model.attention.w_q, model.attention.w_k))
        with torch.autocast(rte.device.type, enabled=False):
            # V . u = (W_k V) . (W_q H) / sqrt(d / H), which makes nothing as wide as u.
            keys = torch.einsum("mrhp,hdp->mrhd", slope.to(w_k), w_k)
            queries = torch.einsum("mrp,hdp->mrhd", rte, w_q)
            moved = _difference((keys * queries).flatten(2).sum(-1)) / w_q.shape[1] ** 0.5 - level
            direction, bias = model.direction(self.weight)
            value = (pooled * direction).flatten(1).sum(-1) + offset * (bias - model.head.bias)
        return value + self.weight * vanilla + (1 - self.weight) * moved

    def vanilla_margins(self, kept: Kept) -> Tensor:
        """The margins [m] at w = 1, without policy feedback."""
        return _difference(kept.rte) @ self.reward_model.head.weight

    def vanilla(self) -> Tensor:
        """The rewards [n * K] of this round at w = 1, without policy feedback."""
        return self.reward_model.vanilla_score(self._rte)

    def step(self, annotated: Tensor, labels_loss: Tensor | None = None, *, grebt: float = 1.0) -> dict[str, float]:
        """GREBT over the round (equations 4-6) on rewards recomputed from the collected pools; one optimizer step.

        annotated [n * K]: the rewards the policy was trained with, which pick the pairs by default. labels_loss: 0-dim,
        added to `grebt` times GREBT; the same in all processes. Returns metrics. Raises RuntimeError if a sequence was
        never collected, FloatingPointError if a loss is not finite.
        """
        metrics = {}
        if self.settings.attends:
            self._check_collected()
            metrics["rm/attended_tokens"] = self._attended_tokens().item()
            if self.num_generations == 1:  # frozen; GREBT measures groups
                return metrics
            if self.settings.scale_anchor:
                metrics["reward/scale"] = self.scale
                self._anchor()
            rewards = self.reward_model.reward(self._absorbed, self._pooled, self._gradient, self.weight, lse=self._lse)
        else:
            rewards = self.reward_model.vanilla_score(self._rte)
        groups, annotated = rewards.view(-1, self.num_generations), annotated.view(-1, self.num_generations)
        picked_by = {"annotated": annotated, "recomputed": groups.detach()}
        source = self.settings.pair_source
        other = "recomputed" if source == "annotated" else "annotated"
        loss, stats = self._grebt(groups, picked_by[source])
        with torch.no_grad():
            _, other_stats = self._grebt(groups, picked_by[other])
        flips = (stats["winner"] != other_stats["winner"]) | (stats["loser"] != other_stats["loser"])
        metrics |= {
            "grebt/loss": loss.item(),
            "grebt/bt": stats["bt"].mean().item(),
            "grebt/entropy": stats["entropy"].mean().item(),
            "grebt/pair_flips": flips.float().mean().item(),
        }
        if not torch.isfinite(loss):
            raise FloatingPointError(f"GREBT loss is {loss.item()}: a reward of this round is not finite")
        if self.settings.trains:
            metrics["rm/grad_norm"] = self._optimize(
                grebt * loss if labels_loss is None else grebt * loss + labels_loss
            )
        return metrics

    def alignment(self, vanilla: Tensor) -> Tensor:
        """Correlation over the round of the fused reward at w = Omega with `vanilla` [n * K], a 0-dim tensor."""
        floor = self.settings.floor
        if self.weight == 1 or floor == 1:
            return torch.ones(())
        fused = self._feedback_value * (1 - floor) / (1 - self.weight) + floor * self._vanilla
        return torch.corrcoef(processes.gather(torch.stack([fused, vanilla], -1)).T)[0, 1]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.settings.scale_anchor:
            state |= {"scale": self.scale, "initial_weight": self._initial_weight}
        return state

    def load_state_dict(self, state: dict[str, Any], *, to_train: bool = True) -> None:
        if to_train:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.settings.scale_anchor:
            self.scale, self._initial_weight = state["scale"], state["initial_weight"]

    def _check_collected(self) -> None:
        missing = int((~self._collected).sum())
        if missing:
            raise RuntimeError(f"{missing} of {len(self._collected)} sequences of this round were never collected")

    def _feedback(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return noise_like(hidden, mask) if self.settings.source == "noise" else hidden

    @torch.no_grad()
    def _anchor(self) -> None:
        """`scale` for the next round, by this round's samples: the deviation inside groups of the initial head's scores
        over that of the rewards. Groups without any leave it as it is."""
        fused = self._feedback_value + self.weight * self._vanilla
        groups = torch.stack([self._initial, fused]).unflatten(1, (-1, self.num_generations))  # [2, n, K]
        wanted, found = processes.total(groups.var(-1, correction=0).sum(-1)).sqrt().tolist()
        if wanted != 0 and found != 0:
            self.scale = wanted / found

    def _grebt(self, rewards: Tensor, pair_scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return grebt_loss(
            rewards, alpha=self.settings.alpha, eps=self.settings.eps, pair_scores=pair_scores, return_stats=True
        )

    def _optimize(self, loss: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = self.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm).item()
        if not norm < float("inf"):  # NaN too
            raise FloatingPointError(f"gradient norm of the reward model is {norm}")
        self.optimizer.step()
        return norm

    def _attended_tokens(self) -> Tensor:
        """exp of the attention's entropy, `lse - E[score]` with `E[score] = u . c`: from what is already at hand."""
        return (self._lse - (self.query * self._pooled).sum(-1)).exp().mean()


def _difference(pairs: Tensor) -> Tensor:
    """[m, ...] of [m, 2, ...]: the first less the second."""
    return pairs[:, 0] - pairs[:, 1]
