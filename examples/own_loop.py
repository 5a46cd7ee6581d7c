"""A loop of one's own around the trainer's round: it ends once the policy is so far from its start.

    python examples/own_loop.py run.yaml --nats 2

`R2MTrainer.round(t)` samples, scores, trains policy and reward model, and writes nothing: what is measured, kept and
saved in between is this loop's.
"""

import argparse

from r2m import load_config
from r2m.commands.build import build_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of `r2m train`")
    parser.add_argument("--nats", type=float, default=2.0, help="KL to the start, a response, that ends the run")
    arguments = parser.parse_args()
    trainer = build_trainer(load_config(arguments.config))
    for t in range(1, trainer.config.rounds + 1):
        row, rollout, batch = trainer.round(t)
        best = batch.rewards.argmax()
        print(f"round {t}: reward {row['reward/mean']:.3f}, KL {row['policy/kl']:.3f}, {rollout.completions[best]!r}")
        for schedule in trainer.run.schedules:  # of the learning rates, which go by rounds
            schedule.step()
        if row["policy/kl"] > arguments.nats:
            break
    trainer.save_pretrained(trainer.config.output_dir)


if __name__ == "__main__":
    main()
