import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_against_reference, ragged
from torch.autograd import forward_ad

from r2m_kernels import (
    absorbed_query,
    attention_pool,
    attention_pool_with_gradient,
    grebt_loss,
    merge_pools,
    merge_pools_with_gradient,
    policy_feedback_reward,
    reward_direction,
    reward_from_pools,
    sequence_to_token_attention,
    time_weighted_fusion,
)
from r2m_kernels import fused_reward as fused_reward_op
from r2m_kernels.attention_pool import reference
from r2m_kernels.cross_attention import _out_of_heads
from r2m_kernels.fusion.reference import fused_reward
from r2m_kernels.grebt.reference import grebt_loss as literal_grebt_loss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
B, S, D_RM, D_P, D = 6, 50, 24, 40, 32
WEIGHTS = ("w_q", "w_k", "w_v", "w_o", "head_weight", "head_bias")


def make_inputs(dtype=F32, hidden_dtype=None, packed=False):
    shapes = {
        "rte": (B, D_RM),
        "hidden": (B * S, D_P) if packed else (B, S, D_P),
        "w_q": (D, D_RM),
        "w_k": (D, D_P),
        "w_v": (D, D_P),
        "w_o": (D_RM, D),
        "head_weight": (D_RM,),
        "head_bias": (),
    }
    inputs = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if name.startswith("w_") else 1.0
        inputs[name] = (scale * torch.randn(shape)).to(dtype)
    inputs["hidden"] = inputs["hidden"].to(hidden_dtype or dtype)
    return inputs


def layouts():
    return {
        "dense": {},
        "masked, one sequence empty": {"mask": (torch.rand(B, S) > 0.5) & (torch.arange(B) != 2)[:, None]},
        "packed, some sequences empty": {"cu_seqlens": ragged([50, 0, 1, 130, 0, 100])},
    }


def literal_reward(rte, hidden, w_q, w_k, w_v, w_o, head_weight, head_bias=None, *, weight, **options):
    """Equations 1 to 3 with K and V projected."""
    aggregated = reference.sequence_to_token_attention(rte, hidden, w_q, w_k, w_v, w_o, **options)
    return fused_reward(aggregated, rte, weight, head_weight, head_bias)


every_layout = pytest.mark.parametrize("layout", list(layouts()))
heads = pytest.mark.parametrize("num_heads", [1, 4])


@heads
@every_layout
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_attention_matches_projected_keys_and_values(layout, num_heads, dtype):
    inputs = make_inputs(dtype, packed="packed" in layout)
    del inputs["head_weight"], inputs["head_bias"]
    options = {"num_heads": num_heads, **layouts()[layout]}
    check_against_reference(
        functools.partial(sequence_to_token_attention, **options),
        functools.partial(reference.sequence_to_token_attention, **options),
        inputs,
        [torch.randn(B, D_RM)],
        dtype,
    )


@heads
@every_layout
def test_value_bias_adds_a_constant_except_to_empty_sequences(layout, num_heads):
    inputs = make_inputs(packed="packed" in layout) | {"v_bias": torch.randn(D)}
    del inputs["head_weight"], inputs["head_bias"]
    options = {"num_heads": num_heads, **layouts()[layout]}
    check_against_reference(
        functools.partial(sequence_to_token_attention, **options),
        functools.partial(reference.sequence_to_token_attention, **options),
        inputs,
        [torch.randn(B, D_RM)],
    )
    if layout != "dense":
        empty = 1 if "packed" in layout else 2
        assert (sequence_to_token_attention(**inputs, **options)[empty] == 0).all()


@heads
@every_layout
@pytest.mark.parametrize("hidden_needs_gradient", [False, True], ids=["one read", "two reads"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F64, F64)], ids=str)
def test_reward_matches_projected_keys_and_values(layout, num_heads, hidden_needs_gradient, dtypes):
    inputs = make_inputs(*dtypes, packed="packed" in layout)
    options = {"num_heads": num_heads, "weight": 0.7, **layouts()[layout]}
    frozen = {} if hidden_needs_gradient else {"hidden": inputs.pop("hidden")}
    reward = functools.partial(policy_feedback_reward, **options, **frozen, hidden_grad=hidden_needs_gradient)

    def literal(**given):
        rows = (given | frozen)["hidden"].to(given["rte"].dtype)
        return literal_reward(**(given | {"hidden": rows}), **options)

    plain = dtypes[0] if dtypes[0] == dtypes[1] else F32
    check_against_reference(reward, literal, inputs, [torch.randn(B)], plain)


@heads
@every_layout
def test_scoring_gives_the_reward_that_training_gives(layout, num_heads):
    inputs = make_inputs(packed="packed" in layout)
    options = {"num_heads": num_heads, "weight": torch.tensor(0.6), **layouts()[layout]}
    with torch.no_grad():
        scored = policy_feedback_reward(**inputs, **options)
    for name in (*WEIGHTS, "rte"):
        inputs[name].requires_grad_()
    trained = policy_feedback_reward(**inputs, **options)
    inputs["hidden"].requires_grad_()
    two_reads = policy_feedback_reward(**inputs, **options, hidden_grad=True)
    assert scored.dtype == trained.dtype == F32
    torch.testing.assert_close(scored, trained.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two_reads, trained, rtol=1e-5, atol=1e-6)


@heads
def test_one_read_gives_every_gradient_of_a_whole_grebt_step(num_heads):
    """Scoring per micro-batch, pools kept, prompt and response pooled apart, then one reward_from_pools and GREBT."""
    k, weight = 3, 0.65
    inputs = make_inputs(F64)
    hidden = inputs.pop("hidden")
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    u = absorbed_query(leaves["rte"], leaves["w_q"], leaves["w_k"], num_heads=num_heads)
    g = reward_direction(leaves["w_v"], leaves["w_o"], leaves["head_weight"], weight=weight, num_heads=num_heads)
    pools = []
    for rows in (slice(0, 2), slice(2, B)):
        halves = (hidden[rows, :20], hidden[rows, 20:])
        parts = [attention_pool_with_gradient(u[rows].detach(), half, g, scale=1.0) for half in halves]
        stacked = (torch.stack(part) for part in zip(*parts, strict=True))
        pools.append(merge_pools_with_gradient(*stacked, g.detach(), scale=1.0))
    pooled, gradient, _ = (torch.cat(column) for column in zip(*pools, strict=True))
    rewards = reward_from_pools(
        u, g, pooled, gradient, leaves["rte"], leaves["head_weight"], leaves["head_bias"], weight=weight
    )
    loss = grebt_loss(rewards.view(-1, k))
    actual = torch.autograd.grad(loss, list(leaves.values()))

    exact = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    exact_rewards = literal_reward(hidden=hidden, **exact, weight=weight, num_heads=num_heads)
    exact_loss, _ = literal_grebt_loss(exact_rewards.view(-1, k), alpha=0.3, eps=1e-2)
    expected = torch.autograd.grad(exact_loss.mean(), list(exact.values()), materialize_grads=True)
    torch.testing.assert_close(rewards, exact_rewards, rtol=1e-13, atol=1e-13)
    for name, one, other in zip(leaves, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@heads
def test_gradcheck_of_the_reward(num_heads):
    inputs = make_inputs(F64)
    small = {name: t[:2] if name in ("rte", "hidden") else t for name, t in inputs.items()}
    hidden = small.pop("hidden")[:, :7]
    leaves = {name: t.clone().requires_grad_() for name, t in small.items()}

    def reward(*values):
        return policy_feedback_reward(
            hidden=hidden, weight=0.4, num_heads=num_heads, **dict(zip(leaves, values, strict=True))
        )

    assert torch.autograd.gradcheck(reward, tuple(leaves.values()), fast_mode=True)


def test_at_weight_one_the_reward_is_the_vanilla_one():
    inputs = make_inputs()
    vanilla = inputs["rte"] @ inputs["head_weight"] + inputs["head_bias"]
    assert torch.equal(policy_feedback_reward(**inputs, weight=1.0), vanilla)


def test_an_empty_sequence_gets_the_vanilla_part_alone():
    inputs = make_inputs()
    reward = policy_feedback_reward(**inputs, weight=0.6, mask=torch.zeros(B, S, dtype=torch.bool))
    torch.testing.assert_close(reward, 0.6 * (inputs["rte"] @ inputs["head_weight"]) + inputs["head_bias"])


def test_head_bias_is_optional_and_may_come_as_one_element():
    inputs = make_inputs()
    bias = inputs.pop("head_bias")
    without = policy_feedback_reward(**inputs, weight=0.6)
    torch.testing.assert_close(policy_feedback_reward(**inputs, head_bias=bias[None], weight=0.6), without + bias)
    leaf = bias[None].clone().requires_grad_()
    policy_feedback_reward(**inputs, head_bias=leaf, weight=0.6).sum().backward()
    assert torch.equal(leaf.grad, torch.tensor([float(B)]))


@pytest.mark.parametrize("leaf", [*WEIGHTS, "rte"])
def test_gradient_of_one_input_alone(leaf):
    inputs = make_inputs(F64)
    one, other = (inputs[leaf].clone().requires_grad_() for _ in range(2))
    policy_feedback_reward(**(inputs | {leaf: one}), weight=0.3).square().sum().backward()
    literal_reward(**(inputs | {leaf: other}), weight=0.3).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loss", ["linear", "square"])
@pytest.mark.parametrize("leaf", ["w_q", "w_k", "w_v", "w_o", "head_weight", "rte"])
def test_second_derivatives_of_the_reward_raise(leaf, loss):
    inputs = make_inputs()
    inputs[leaf].requires_grad_()
    reward = policy_feedback_reward(**inputs, weight=0.3)
    total = reward.sum() if loss == "linear" else reward.square().sum()
    (gradient,) = torch.autograd.grad(total, inputs[leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="reward_from_pools: second derivatives are not available"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("num_heads", [1, 2])
def test_the_products_around_the_pool_have_first_and_second_derivatives(num_heads):
    def leaf(*shape):
        return torch.randn(shape, dtype=F64, requires_grad=True)

    query = functools.partial(absorbed_query, num_heads=num_heads)
    direction = functools.partial(reward_direction, weight=0.3, num_heads=num_heads)
    for function, leaves in {
        query: (leaf(3, 5), leaf(4, 5), leaf(4, 6)),
        direction: (leaf(4, 6), leaf(5, 4), leaf(5)),
        _out_of_heads: (leaf(3, num_heads, 6), leaf(4, 6), leaf(5, 4), leaf(3, 4)),
    }.items():
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_raise_in_the_two_read_form_too():
    inputs = make_inputs()
    for name in ("w_q", "hidden"):
        inputs[name].requires_grad_()
    reward = policy_feedback_reward(**inputs, weight=0.3, hidden_grad=True).square().sum()
    (gradient,) = torch.autograd.grad(reward, inputs["w_q"], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_pool: second derivatives are not available"):
        gradient.sum().backward()


def test_inputs_made_under_inference_mode():
    inputs = make_inputs()
    with torch.inference_mode():
        rte, hidden = inputs["rte"].clone(), inputs["hidden"].clone()
    gradients = []
    for frozen in ({}, {"rte": rte, "hidden": hidden}):
        leaves = {name: inputs[name].clone().requires_grad_() for name in WEIGHTS}
        reward = policy_feedback_reward(**(inputs | leaves | frozen), weight=0.3)
        gradients.append([reward, *torch.autograd.grad(reward.square().sum(), list(leaves.values()))])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_pools_made_under_inference_mode_serve_training():
    inputs = make_inputs(F64)
    leaves = {name: inputs[name].clone().requires_grad_() for name in WEIGHTS}
    with torch.inference_mode():
        u = absorbed_query(inputs["rte"], inputs["w_q"], inputs["w_k"])
        g = reward_direction(inputs["w_v"], inputs["w_o"], inputs["head_weight"], weight=0.3)
        pooled, gradient, _ = attention_pool_with_gradient(u, inputs["hidden"], g, scale=1.0)
    u = absorbed_query(inputs["rte"], leaves["w_q"], leaves["w_k"])
    g = reward_direction(leaves["w_v"], leaves["w_o"], leaves["head_weight"], weight=0.3)
    head = leaves["head_weight"], leaves["head_bias"]
    reward = reward_from_pools(u, g, pooled, gradient, inputs["rte"], *head, weight=0.3)
    direct = policy_feedback_reward(**(inputs | leaves), weight=0.3)
    for one, other in zip(
        torch.autograd.grad(reward.square().sum(), list(leaves.values())),
        torch.autograd.grad(direct.square().sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_outer_autocast_changes_nothing():
    inputs = make_inputs(hidden_dtype=BF16)
    leaves = {name: inputs[name].requires_grad_() for name in WEIGHTS}

    def run():
        aggregated = sequence_to_token_attention(*list(inputs.values())[:6])
        reward = policy_feedback_reward(**inputs, weight=0.3)
        return aggregated, reward

    plain = run()
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        inside = run()
    for one, other in zip(plain, inside, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for leaf in leaves.values():
        leaf.grad = None
    one, other = (torch.autograd.grad(r[1].square().sum(), list(leaves.values())) for r in (plain, inside))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_head_of_a_classification_model_fits():
    """Its score.weight is [1, D_rm] and its bias [1]: the same rewards and gradients."""
    inputs = make_inputs(F64)
    aggregated = torch.randn(B, D_RM, dtype=F64)
    u = absorbed_query(inputs["rte"], inputs["w_q"], inputs["w_k"])
    results = []
    for shape in ((D_RM,), (1, D_RM)):
        phi = inputs["head_weight"].view(shape).clone().requires_grad_()
        given = inputs | {"head_weight": phi, "head_bias": inputs["head_bias"].view(shape[:-1])}
        g = reward_direction(inputs["w_v"], inputs["w_o"], phi, weight=0.3)
        rewards = (
            policy_feedback_reward(**given, weight=0.3),
            fused_reward_op(aggregated, inputs["rte"], 0.3, phi, given["head_bias"]),
            reward_from_pools(u, g, u, u, inputs["rte"], phi, given["head_bias"], weight=0.3),
        )
        gradients = [torch.autograd.grad(reward.square().sum(), phi)[0] for reward in rewards]
        assert all(gradient.shape == shape for gradient in gradients)
        results.append([*rewards, *(gradient.flatten() for gradient in gradients)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def composites(inputs, leaves):
    """Every function that has products of weights, as a scalar of the leaves."""
    rte, hidden, w_q, w_k, w_v, w_o, phi, bias = (inputs | leaves).values()
    frozen = hidden.detach()
    return {
        "reward": policy_feedback_reward(rte, frozen, w_q, w_k, w_v, w_o, phi, bias, weight=0.3, num_heads=4),
        "reward, two reads": policy_feedback_reward(
            rte, hidden, w_q, w_k, w_v, w_o, phi, bias, weight=0.3, num_heads=4, hidden_grad=True
        ),
        "attention": sequence_to_token_attention(rte, hidden, w_q, w_k, w_v, w_o, v_bias=w_q[:, 0]),
        "query": absorbed_query(rte, w_q, w_k, num_heads=4),
        "direction": reward_direction(w_v, w_o, phi, weight=0.3, num_heads=4),
    }


@pytest.mark.parametrize("forward_inside", [False, True])
def test_a_backward_inside_of_autocast_rounds_no_gradient(forward_inside):
    inputs = make_inputs()
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    autocast = functools.partial(torch.autocast, torch.get_default_device().type, dtype=BF16)
    with autocast(enabled=forward_inside):
        inside = composites(inputs, leaves)
    for name, expected in composites(inputs, leaves).items():
        grad = functools.partial(torch.autograd.grad, inputs=list(leaves.values()), allow_unused=True)
        wanted = grad(expected.square().sum())
        with autocast():
            actual = grad(inside[name].square().sum())
        for one, other in zip(actual, wanted, strict=True):
            assert one is other is None or torch.equal(one, other), name


def test_shapes_come_from_meta_tensors():
    inputs = {name: t.to("meta").requires_grad_() for name, t in make_inputs().items()}
    for reward in composites(inputs, {}).values():
        assert reward.is_meta and reward.dtype == F32
        reward.sum().backward()
    pools = torch.empty(2, B, D_P, device="meta"), torch.empty(2, B, device="meta")
    assert merge_pools(*pools)[0].shape == (B, D_P)


def test_forward_mode_raises_or_is_right():
    inputs = make_inputs(F64)
    query, pools = torch.randn(B, D_P, dtype=F64), torch.randn(2, B, D_P, dtype=F64)
    g, rte, phi = pools[0, 0], inputs["rte"], inputs["head_weight"]
    for name, function in {
        "attention_pool": lambda t: attention_pool(t, inputs["hidden"]),
        "attention_pool_with_gradient": lambda t: attention_pool_with_gradient(t, inputs["hidden"], g),
        "reward_from_pools": lambda t: reward_from_pools(t, g, *pools, rte, phi, weight=0.3),
        "fused_reward": lambda t: fused_reward_op(t, t, 0.3, g),
        "time_weighted_fusion": lambda t: time_weighted_fusion(t, t, 0.3),
        "grebt_loss": grebt_loss,
    }.items():
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.jvp(function, (query,), (query,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}: .*forward-mode"):
            function(forward_ad.make_dual(query, query))
    w_q, w_k = inputs["w_q"].requires_grad_(), inputs["w_k"]
    _, tangent = torch.func.jvp(lambda t: absorbed_query(t, w_q, w_k), (rte,), (rte,))
    torch.testing.assert_close(tangent, absorbed_query(rte, w_q, w_k))  # it is linear


def test_gradients_do_not_follow_what_an_inference_buffer_becomes():
    """Only hidden, of which no copy is kept, must stay as it is."""
    inputs = make_inputs()
    gradients = []
    for overwritten in (False, True):
        leaves = {name: inputs[name].clone().requires_grad_() for name in WEIGHTS}
        with torch.inference_mode():
            rte, aggregated, query = inputs["rte"].clone(), inputs["rte"].clone(), torch.ones(B, D_P)
            mask = torch.ones(B, S, dtype=torch.bool)
        hidden = inputs["hidden"].clone().requires_grad_()
        reward = policy_feedback_reward(rte, inputs["hidden"], **leaves, weight=0.3, mask=mask)
        fused = fused_reward_op(aggregated, rte, 0.3, leaves["head_weight"])
        loss = reward.square().sum() + fused.square().sum() + attention_pool(query, hidden, mask=mask).sum()
        if overwritten:
            with torch.inference_mode():
                for buffer in (rte, aggregated, query):
                    buffer.normal_()
                mask.fill_(False)
        gradients.append(torch.autograd.grad(loss, [*leaves.values(), hidden]))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=20)
@given(weight=st.floats(0, 1), as_tensor=st.booleans())
def test_weight_may_be_a_float_or_a_tensor(weight, as_tensor):
    inputs = make_inputs(F64)
    given_weight = torch.tensor(weight, dtype=F64) if as_tensor else weight
    actual = policy_feedback_reward(**inputs, weight=given_weight)
    torch.testing.assert_close(actual, literal_reward(**inputs, weight=weight), rtol=1e-12, atol=1e-12)


def test_batch_of_no_sequences():
    inputs = make_inputs()
    inputs["rte"], inputs["hidden"] = inputs["rte"][:0], inputs["hidden"][:0]
    inputs["w_q"].requires_grad_()
    reward = policy_feedback_reward(**inputs, weight=0.5, num_heads=2)
    reward.sum().backward()
    assert reward.shape == (0,)
    assert (inputs["w_q"].grad == 0).all()
    assert sequence_to_token_attention(*list(inputs.values())[:6]).shape == (0, D_RM)
