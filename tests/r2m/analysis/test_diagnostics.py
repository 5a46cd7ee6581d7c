"""What `r2m diagnose` measures, against values worked out by hand, in float64 or by scipy; and the command."""

import json
import math
import random
import re

import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

from r2m.analysis import diagnostics
from r2m.analysis.degeneration import degeneration, thirds
from r2m.analysis.diagnostics import (
    accuracies,
    accuracy_change,
    alignment,
    centred,
    observe,
    pool_depths,
    preference_cosines,
    preference_gap,
    similarity_and_reward,
    text_pairs,
)
from r2m.analysis.statistics import Estimate, jackknife, kendall, pearson, spearman
from r2m.cli import app
from r2m.commands import diagnose as diagnose_module
from r2m.commands.diagnose import RUN_METRICS
from r2m.data.sources import Preference
from r2m.fitting.pairs import embed_pairs, score_rollout, tokenize_pairs
from r2m.method.reward_model import R2MRewardModel

PNG = b"\x89PNG\r\n\x1a\n"
PAIRS = [Preference("Q:" * (1 + i % 3), f" yes {i}" * (1 + i % 4), f" no {i}" * (1 + i % 2)) for i in range(12)]


@pytest.fixture
def rollout(policy, tokenizer):
    return tokenize_pairs(policy, tokenizer, PAIRS)


@pytest.fixture(params=[1, 2], ids=["one head", "two heads"])
def reward_model(request, reward_checkpoint, policy):
    return tiny.reward_model(reward_checkpoint, policy, num_heads=request.param)


# ---- statistics ----


def test_correlations_are_scipys_with_ties_and_without():
    stats = pytest.importorskip("scipy.stats", reason="scipy is what these correlations are compared with")
    torch.manual_seed(0)
    x = torch.randn(60)
    for y in (torch.randn(60), -x + 0.5 * torch.randn(60), (3 * x).round()):
        for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr), (kendall, stats.kendalltau)):
            assert ours(x, y).item() == pytest.approx(theirs(x.numpy(), y.numpy())[0], abs=1e-6)


def test_correlations_by_hand():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 3.0, 9.0])
    assert spearman(x, y).item() == pytest.approx(4.5 / math.sqrt(5 * 4.5))  # ranks 1, 2.5, 2.5, 4
    assert kendall(x, y).item() == pytest.approx(5 / math.sqrt(6 * 5))  # five pairs agree, one is a tie in y
    assert kendall(x, -x).item() == spearman(x, -(x**3)).item() == pytest.approx(-1)


def test_the_jackknife_of_a_mean_is_its_standard_error_and_of_few_pairs_leaves_out_each():
    torch.manual_seed(0)
    values = torch.randn(10, dtype=torch.float64)
    ((mean, error),) = jackknife(lambda kept: values[kept].mean()[None], 10)
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx((values.std() / math.sqrt(10)).item())
    many = torch.randn(20_000, dtype=torch.float64)
    ((_, error),) = jackknife(lambda kept: many[kept].mean()[None], 20_000)
    assert error == pytest.approx(1 / math.sqrt(20_000), rel=0.5)  # known to a sixth from 20 groups


def test_an_estimate_is_written_to_the_second_digit_of_its_error():
    assert str(Estimate(0.123456, 0.00123)) == "0.1235 ± 0.0012"
    assert str(Estimate(22.912, 0.262)) == "22.91 ± 0.26"
    assert str(Estimate(150.4, 31.0)) == "150 ± 31"
    assert str(Estimate(0.5, 0.0)) == "0.500 ± 0.000"
    assert str(Estimate(math.nan, math.nan)) == "nan ± nan"
    assert Estimate(1, 0.4).is_above(0) and not Estimate(1, 0.6).is_above(0)
    assert Estimate(-1, 0.4).is_below(0) and not Estimate(-1, 0.6).is_below(0)


# ---- hidden states ----


def test_every_depth_is_pooled_over_the_feedback_positions(policy, rollout):
    depths, pooled = pool_depths(policy, rollout, batch_size=5)
    states = policy.model(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=rollout.position_ids,
        output_hidden_states=True,
    ).hidden_states
    assert depths == [0, 1, 2] and pooled.shape == (3, 24, 32)
    for depth, state in zip(depths, states, strict=True):
        expected = torch.stack([row[m].mean(0) for row, m in zip(state.detach(), rollout.feedback_mask, strict=True)])
        torch.testing.assert_close(pooled[depth], expected, rtol=1e-4, atol=1e-5)


def test_of_a_deep_model_evenly_spaced_depths_are_taken(tokenizer, monkeypatch):
    monkeypatch.setattr(diagnostics, "MAX_DEPTHS", 3)
    deep = tiny.policy(num_hidden_layers=6).train()
    depths, pooled = pool_depths(deep, tokenize_pairs(deep, tokenizer, PAIRS), batch_size=24)
    assert depths == [0, 3, 6] and len(pooled) == 3
    assert deep.training


def literal_cosines(pooled):
    n = len(pooled) // 2
    cosine = F.cosine_similarity(pooled[:, None].double(), pooled[None].double(), dim=-1)
    pairs = [(i, j) for i in range(2 * n) for j in range(i + 1, 2 * n) if i % n != j % n]
    same = [cosine[i, j] for i, j in pairs if (i < n) == (j < n)]
    cross = [cosine[i, j] for i, j in pairs if (i < n) != (j < n)]
    return torch.stack([torch.stack(same).mean(), torch.stack(cross).mean()])


def test_cosines_are_means_over_texts_of_different_pairs():
    torch.manual_seed(0)
    pooled = torch.randn(14, 5) + 3
    torch.testing.assert_close(preference_cosines(pooled), literal_cosines(pooled))
    same, cross = literal_cosines(centred(pooled))
    gap = preference_gap(pooled)
    assert gap["gap_centred"].value == pytest.approx((same - cross).item())
    assert gap["gap"].value == pytest.approx(gap["same"].value - gap["cross"].value)


def test_the_gap_shows_a_preference_only_where_there_is_one():
    torch.manual_seed(0)
    noise, direction = torch.randn(200, 8), torch.zeros(8)
    direction[0] = 1
    sign = torch.ones(200, 1)
    sign[100:] = -1
    common = 20 * torch.ones(8)  # raw cosines near 1
    told, untold = preference_gap(common + noise + sign * direction), preference_gap(common + noise)
    assert told["same"].value > 0.99
    assert told["gap"].is_above(0) and told["gap_centred"].is_above(0.05)
    assert not untold["gap_centred"].is_above(0.02)


def test_pairs_of_texts_are_distinct_of_different_preference_pairs_and_at_most_so_many():
    first, second = text_pairs(5)
    assert len(first) == 45 - 5 and len(set(zip(first.tolist(), second.tolist(), strict=True))) == 40
    assert (first < second).all() and (first % 5 != second % 5).all()
    assert text_pairs(100).shape == (2, diagnostics.TEXT_PAIRS)


@pytest.mark.slow
def test_similarity_and_reward_are_correlated_where_states_are_the_reward():
    torch.manual_seed(0)
    angle = torch.rand(80) * 3
    cosine, distance, correlations = similarity_and_reward(torch.stack([angle.cos(), angle.sin()], 1), angle)
    torch.testing.assert_close(cosine, distance.cos(), rtol=0, atol=1e-6)
    assert correlations["spearman"].value == pytest.approx(-1) and correlations["kendall"].value == pytest.approx(-1)
    assert -1 < correlations["pearson"].value < -0.9
    assert not similarity_and_reward(torch.randn(80, 2), angle)[2]["spearman"].is_below(-0.1)


# ---- the cross-attention ----


def test_rewards_are_those_of_the_reward_model_at_any_weight(reward_model, policy, rollout):
    rte = embed_pairs(reward_model, PAIRS)
    seen = observe(reward_model, policy, rte, rollout, batch_size=7)
    for weight in (0.0, 0.3, 0.6, 1.0):
        expected = score_rollout(reward_model, policy, rte, rollout, weight)
        torch.testing.assert_close(seen.reward(weight), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_measured_as_the_literal_softmax_says(reward_model, policy, rollout):
    rte, heads = embed_pairs(reward_model, PAIRS), reward_model.config.num_heads
    seen = observe(reward_model, policy, rte, rollout, batch_size=24)
    hidden = policy.model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=rollout.position_ids
    ).last_hidden_state
    weights = reward_model.attention
    width_p = rollout.input_ids.shape[1] - rollout.completion_mask.shape[1]
    for i in range(24):
        query = (weights.w_q.double() @ rte[i].double()).view(heads, -1)
        keys = (hidden[i].double() @ weights.w_k.double().T).unflatten(-1, (heads, -1))
        scores = torch.einsum("he,she->hs", query, keys) / math.sqrt(query.shape[-1])
        p = scores.masked_fill(~rollout.feedback_mask[i], -math.inf).softmax(-1)
        entropy = -torch.xlogy(p, p).sum(-1)
        assert seen.attended_tokens[i].item() == pytest.approx(entropy.exp().mean().item(), rel=1e-3)
        assert seen.prompt_attention[i].item() == pytest.approx(p[:, :width_p].sum(-1).mean().item(), abs=1e-4)
        positions = rollout.feedback_mask[i]
        assert seen.prompt_positions[i].item() == pytest.approx((positions[:width_p].sum() / positions.sum()).item())


def test_response_positions_leave_no_attention_to_the_prompt(reward_model, policy, tokenizer):
    pairs = [*PAIRS, Preference("Q:", "a", "b")]  # a response of one token has no position
    rollout = tokenize_pairs(policy, tokenizer, pairs, positions="response")
    seen = observe(reward_model, policy, embed_pairs(reward_model, pairs), rollout, batch_size=26)
    assert not seen.prompt_attention.any() and not seen.prompt_positions.any()
    assert seen.attended_tokens.isfinite().all() and seen.aggregated.isfinite().all()


def test_alignment_of_an_attention_without_output_is_perfect(reward_checkpoint, policy, rollout):
    model = tiny.reward_model(reward_checkpoint, policy, zero_output=True)
    values = alignment(observe(model, policy, embed_pairs(model, PAIRS), rollout, batch_size=24), 0.6)
    assert values["pearson"].value == pytest.approx(1) and values["spearman"].value == pytest.approx(1)
    assert values["noise_change"].value == 0 and values["noise_correlation"].value == pytest.approx(1)


def test_noise_moves_the_reward_as_measured(reward_model, policy, rollout):
    seen = observe(reward_model, policy, embed_pairs(reward_model, PAIRS), rollout, batch_size=24)
    values = alignment(seen, 0.6)
    fused, noise = 0.4 * seen.aggregated + 0.6 * seen.vanilla, 0.4 * seen.noise + 0.6 * seen.vanilla
    expected = (fused - noise).abs().mean() / fused.std()
    assert values["noise_change"].value == pytest.approx(expected.item(), rel=1e-4) and expected > 0
    assert values["noise_correlation"].value == pytest.approx(pearson(fused, noise).item(), rel=1e-4)
    assert values["attended_tokens"].value == pytest.approx(seen.attended_tokens.mean().item(), rel=1e-5)


def test_accuracies_and_their_change():
    good, bad = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 5.0, 1.0, 2.0])  # two pairs
    zero = torch.zeros(4)
    seen = diagnostics.Observed(good, bad, zero, zero, zero, zero)
    values = accuracies(seen, 0.5)
    assert values["vanilla"] == Estimate(0.5, pytest.approx(math.sqrt(0.25 / 2)))
    assert values["aggregated"].value == 0.5
    assert accuracy_change(good, good) == Estimate(0, 0)
    assert accuracy_change(good, torch.tensor([4.0, 2.0, 3.0, 0.0])) == Estimate(0.5, 0.5)


# ---- a finished run ----


HEALTHY = {
    "reward/degenerate_share": 0.1,
    "reward/group_std": 0.4,
    "rm/pair_accuracy": 0.7,
    "grebt/pair_flips": 0.1,
    "policy/entropy": 2.0,
    "length/mean": 100.0,
    "policy/kl": 1.0,
    "policy/clip_share": 0.1,
    "reward/mean": -0.5,
    "reward/initial": -0.7,
    "reward/std": 1.0,
}


def rows(rounds=6, **last):
    """A run whose last third has other metrics."""
    return [{"round": t} | HEALTHY | (last if t > rounds * 2 / 3 else {}) for t in range(1, rounds + 1)]


def test_thirds_are_means_over_the_rounds_that_have_a_metric():
    metrics = [{"round": t, "policy/kl": float(t)} for t in range(1, 8)]
    metrics[0]["rm/pair_accuracy"] = 0.5
    table = thirds(metrics)
    assert table["policy/kl"] == [1.5, 4.0, 6.5]  # rounds 1 to 2, 3 to 5, 6 to 7
    assert table["rm/pair_accuracy"] == [0.5, None, None]
    with pytest.raises(ValueError, match="the run has 2 rounds; expected at least 3"):
        thirds(metrics[:2])


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("reward/degenerate_share", 0.37, r"group std under eps \(0\.01\) in 37% of groups .* 10% over the first"),
        ("reward/group_std", 1.2, "3.00 times as wide .* Set r2m.scale_anchor: true, or lower"),
        ("reward/group_std", 0.1, "0.25 times as wide .* samples grow alike"),
        ("rm/pair_accuracy", 0.6, "fell from 0.700 to 0.600"),
        ("grebt/pair_flips", 0.6, "in 60% of groups"),
        ("policy/entropy", 0.9, "fell from 2.00 to 0.90 nats"),
        ("length/mean", 250.0, "from 100 to 250 tokens"),
        ("length/mean", 40.0, "from 100 to 40 tokens"),
        (
            "reward/mean",
            2.44,
            r"own reward rose from -0.500 to 2.440, .* score went from -0.700 to -0.700\. The policy may exploit",
        ),
        ("policy/clip_share", 0.5, "10% of the importance ratios are clipped over the first third, 50% over the last"),
    ],
)
def test_what_degenerates_is_said_alone_and_in_plain_words(metric, value, said):
    (warning,) = degeneration(thirds(rows(**{metric: value})), eps=0.01)
    assert re.search(said, warning), warning


@pytest.mark.parametrize(
    "last",
    [
        {},
        {"reward/degenerate_share": 0.25},
        {"reward/group_std": 0.79},
        {"rm/pair_accuracy": 0.66},
        {"grebt/pair_flips": 0.5},
        {"policy/entropy": 1.1},
        {"length/mean": 190.0},
        {"reward/mean": -0.1},
        {"reward/mean": 2.44, "reward/initial": 0.0},
        {"policy/clip_share": 0.25},
    ],
)
def test_what_stays_within_bounds_is_not_warned_about(last):
    assert degeneration(thirds(rows(**last)), eps=0.01) == []


def test_the_judges_word_is_beside_a_reward_that_rises_alone():
    table = thirds([row | {"eval/judge": 1.0 / row["round"]} for row in rows(**{"reward/mean": 2.44})])
    (warning,) = degeneration(table, eps=0.01)
    assert "; the judge's went from 0.750 to 0.183. The policy may exploit" in warning


def test_a_run_without_feedback_lacks_metrics_and_is_no_error():
    assert degeneration(thirds([{"round": t, "policy/kl": 0.1} for t in (1, 2, 3)]), eps=0.01) == []


# ---- the command ----


def diagnose(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


@pytest.fixture
def files(tmp_path, reward_checkpoint):
    """A config beside its policy, and preference pairs."""
    tiny.policy().save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    settings = {
        "policy": str(tmp_path / "policy"),
        "reward_model": str(reward_checkpoint),
        "output_dir": str(tmp_path / "run"),
        "r2m": {"inner_width": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    write_pairs(tmp_path / "pairs.jsonl", 40)
    return tmp_path


def write_pairs(path, count):
    """Of random letters: there is nothing to learn, and so the fit ends soon."""
    draw = random.Random(0)
    texts = [{name: "".join(draw.choices("abcd ", k=8)) for name in ("chosen", "rejected")} for _ in range(count)]
    lines = [{"prompt": f"Q{i}:"} | text for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_before_a_run_everything_is_measured_and_no_file_of_the_reward_model_changes(files, policy, reward_checkpoint):
    saved = tiny.reward_model(reward_checkpoint, policy)
    saved.save_pretrained(files / "reward")
    before = {path: path.read_bytes() for path in (files / "reward").iterdir()}
    result = diagnose(
        files / "run.yaml", f"reward_model={files / 'reward'}", "r2m.floor=0.5", "--pairs", files / "pairs.jsonl"
    )
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in (files / "reward").iterdir()} == before
    out = files / "run" / "diagnosis" / "before"
    for name in ("depths.png", "similarity.png", "alignment.png"):
        assert (out / name).read_bytes().startswith(PNG)
    assert (out / "report.md").read_text().strip() in result.stdout
    values = json.loads((out / "diagnostics.json").read_text())
    assert values["pairs"] == {"training": 15, "stopping": 5, "measured": 20} and values["floor"] == 0.5
    assert [row["depth"] for row in values["depths"]] == [0, 1, 2]
    trained = f"after {values['warm_start_steps']} steps" + (" from the mean state" if values["mean_start"] else "")
    assert set(values["accuracy"]) == set(values["alignment"]) == {"as it comes", trained}
    # The reward model is read as saved: the vanilla reward's accuracy does not depend on training.
    assert len({state["vanilla"]["value"] for state in values["accuracy"].values()}) == 1
    change = [state["aggregated"]["value"] for state in values["accuracy"].values()]
    assert values["accuracy_change"]["aggregated"]["value"] == pytest.approx(change[1] - change[0])
    assert R2MRewardModel.from_pretrained(files / "reward").config.floor == saved.config.floor


@pytest.mark.slow
def test_the_same_command_gives_the_same_figures_and_takes_held_out_pairs(files):
    write_pairs(files / "held_out.jsonl", 14)
    for name in ("one", "two"):
        result = diagnose(
            files / "run.yaml", "--pairs", files / "pairs.jsonl", "--held-out", files / "held_out.jsonl",
            "--max-pairs", 16, "--output", files / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    one, two = (json.loads((files / name / "diagnostics.json").read_text()) for name in ("one", "two"))
    assert one == two and one["pairs"] == {"training": 12, "stopping": 4, "measured": 14}


def test_after_a_run_the_report_has_thirds_and_warnings(tmp_path):
    (tmp_path / "config.yaml").write_text("rounds: 6\nr2m: {eps: 0.02}\n")
    metrics = rows(**{"reward/degenerate_share": 0.37})
    metrics[0]["eval/judge"] = 0.125
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    result = diagnose(tmp_path)
    assert result.exit_code == 0, result.output
    assert "- group std under eps (0.02) in 37% of groups over the last third" in result.stdout
    assert "| share of groups with a std under eps " in result.stdout and "0.370 " in result.stdout
    assert RUN_METRICS["judge/vader"] not in result.stdout  # the rows have none
    assert f"| {RUN_METRICS['eval/judge']} " in result.stdout and "| 0.125 " in result.stdout
    out = tmp_path / "diagnosis" / "after"
    assert (out / "metrics.png").read_bytes().startswith(PNG)
    assert json.loads((out / "diagnostics.json").read_text())["rounds"] == 6

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    result = diagnose(tmp_path, "--output", tmp_path / "elsewhere")
    assert "Nothing to warn about." in result.stdout and (tmp_path / "elsewhere" / "report.md").is_file()


def test_an_interrupted_diagnosis_leaves_no_empty_folder(files, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose_module, "load_models", interrupted)
    assert diagnose(files / "run.yaml", "--pairs", files / "pairs.jsonl").exit_code != 0
    assert not (files / "run").exists()


def test_mistakes_end_in_one_clear_line(files):
    config, pairs = files / "run.yaml", files / "pairs.jsonl"
    (files / "empty").mkdir()
    (files / "started").mkdir()
    (files / "started" / "config.yaml").write_text("rounds: 3\n")
    (files / "started" / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    write_pairs(files / "few.jsonl", 19)
    for arguments, said in (
        ([config], "--pairs is missing; "),
        ([config, "--pairs", files / "none.jsonl"], "none.jsonl"),
        ([config, "--pairs", files / "few.jsonl"], "pairs: 10 to train on and 9 to measure on can be used; expected"),
        ([config, "--pairs", pairs, "policy=''"], "policy is not set; expected it in the config file or as policy=..."),
        ([files / "empty"], "holds no metrics.jsonl with a round; expected the output_dir of a run"),
        ([files / "started"], "the run has 2 rounds; expected at least 3"),
        ([files / "started", "--pairs", pairs], "it takes --output alone"),
        ([config, "--pairs", pairs, "--output", pairs], "cannot be written"),
    ):
        result = diagnose(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stderr.splitlines()[-1].startswith("error: ") and said in result.stderr, result.stderr
    (files / "started" / "config.yaml").unlink()
    assert "holds no config.yaml; expected" in diagnose(files / "started").stderr
