"""The pool runs where the hidden states are: u and g go to the policy's process, c and V come back.

Two processes: the actor worker runs the policy, the trainer has the part of the reward model that is trained. Hidden
states never leave the worker; of each sequence three vectors of the policy's width travel, however long it is. At the
end the trained weights are compared with those of the same rounds in one process.
"""

import copy
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import r2m_kernels as rk

N, K, ROUNDS = 4, 8, 3  # prompts, responses to each
POLICY_WIDTH, RM_WIDTH, INNER_WIDTH = 256, 192, 64


def run_policy(t: int) -> tuple[Tensor, Tensor]:
    """Stands for the policy's forward pass in round t: hidden states [total, D_p] and cu_seqlens int32 [n * K + 1].

    Frameworks that remove padding have them packed like this.
    """
    generator = torch.Generator().manual_seed(t)
    lengths = torch.randint(1, 256, (N * K,), generator=generator)
    hidden = torch.randn(int(lengths.sum()), POLICY_WIDTH, generator=generator, dtype=torch.bfloat16)
    return hidden, nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def actor_worker(connection: Connection) -> None:
    """Answer (t, u, g) with (c, V, bytes of the hidden states behind them) until None comes."""
    while (request := connection.recv()) is not None:
        t, u, g = request
        hidden, cu_seqlens = run_policy(t)
        pooled, gradient, _ = rk.attention_pool_with_gradient(u, hidden, g, cu_seqlens=cu_seqlens, scale=1.0)
        connection.send((pooled, gradient, hidden.nbytes))


def train(
    attention: rk.SequenceToTokenAttention, head: rk.RewardHead, reward: Callable[[int, Tensor, float], Tensor]
) -> None:
    """The reward model's rounds. reward(t, rte, w) gives the rewards [n * K], with the graph behind them."""
    optimizer = torch.optim.AdamW([*attention.parameters(), head.weight], lr=3e-3, weight_decay=0.0)
    texts = torch.Generator().manual_seed(0)
    for t in range(1, ROUNDS + 1):
        rte = torch.randn(N * K, RM_WIDTH, generator=texts)  # the reward model's embedding of each text
        rewards = reward(t, rte, rk.time_weight(t, ROUNDS, floor=0.6))
        optimizer.zero_grad()
        rk.grebt_loss(rewards.view(N, K), alpha=0.3, eps=1e-2).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    local = rk.PolicyFeedbackReward(RM_WIDTH, POLICY_WIDTH, INNER_WIDTH)
    attention, head = copy.deepcopy((local.attention, local.head))

    processes = mp.get_context("spawn")
    connection, other_end = processes.Pipe()
    worker = processes.Process(target=actor_worker, args=(other_end,), daemon=True)
    worker.start()
    other_end.close()  # so that recv fails, rather than waits, if the worker dies

    def remote_reward(t: int, rte: Tensor, weight: float) -> Tensor:
        u = rk.absorbed_query(rte, attention.w_q, attention.w_k)
        g = rk.reward_direction(attention.w_v, attention.w_o, head.weight, weight=weight)
        connection.send((t, u.detach(), g.detach()))
        pooled, gradient, stayed = connection.recv()
        travelled = sum(tensor.nbytes for tensor in (u, g, pooled, gradient))
        print(f"round {t}: {travelled:,} bytes travelled, {stayed:,} bytes of hidden states stayed")
        return rk.reward_from_pools(u, g, pooled, gradient, rte, head.weight, head.bias, weight=weight)

    train(attention, head, remote_reward)
    connection.send(None)
    worker.join()

    def local_reward(t: int, rte: Tensor, weight: float) -> Tensor:
        hidden, cu_seqlens = run_policy(t)
        return local(rte, hidden, weight=weight, cu_seqlens=cu_seqlens)

    train(local.attention, local.head, local_reward)
    pairs = zip(attention.parameters(), local.attention.parameters(), strict=True)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"largest relative difference of trained weights from one process: {difference:.1e}")


if __name__ == "__main__":
    main()
