"""R2M: reward models that see the policy's own hidden states, trained in step with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# The heavy imports live inside the commands: `r2m --help` should not wait for them.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def demo(
    policy: Annotated[str | None, typer.Option(help="Hub id or path; default: SmolLM2-135M-Instruct.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Hub id or path of the backbone; default: the policy.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help=".jsonl or .txt; default: openings of movie reviews.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds of each arm.")] = 16,
    seed: Annotated[int, typer.Option(help="Of data splits, weights and sampling.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for metrics, samples, table and plots.")] = Path("runs/demo"),
) -> None:
    """Train a small language model on movie reviews: RLOO with a fixed reward model against RLOO + R2M."""
    with _clear_errors():
        from r2m.demo import run_demo

        run_demo(policy=policy, reward_model=reward_model, prompts=prompts, rounds=rounds, seed=seed, output=output)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file; every key is a field of r2m.R2MConfig.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dots reach into blocks: r2m.floor=0.7")
    ] = None,
    resume_from: Annotated[Path | None, typer.Option(help="A folder checkpoint-<round> of this run.")] = None,
) -> None:
    """Train a policy with R2M; policy and reward model are saved in the config's output_dir."""
    with _clear_errors():
        import torch

        import r2m
        from r2m.plots import plot_run

        settings = r2m.load_config(config, overrides)
        for key in ("policy", "reward_model", "prompts"):
            if not getattr(settings, key):
                raise ValueError(f"{key} is not set; expected it in {config} or as {key}=...")
        prompts = r2m.load_prompts(settings.prompts)
        torch.manual_seed(settings.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = r2m.load_policy(settings, device)
        tokenizer = r2m.load_tokenizer(
            settings.policy, revision=settings.policy_revision, trust_remote_code=settings.trust_remote_code
        )
        reward_model = r2m.R2MRewardModel.from_pretrained(
            settings.reward_model,
            policy=settings.policy,
            revision=settings.reward_model_revision,
            policy_revision=settings.policy_revision,
            device=device,
            trust_remote_code=settings.trust_remote_code,
            inner_width=settings.r2m.inner_width,
            num_heads=settings.r2m.num_heads,
            floor=settings.r2m.floor,
            standardize=settings.r2m.standardize,
            zero_output=settings.r2m.zero_output,
        )
        trainer = r2m.R2MTrainer(policy, reward_model, tokenizer, prompts, settings)
        trainer.train(resume_from)
        trainer.save_pretrained(settings.output_dir)
        plot_run(trainer.output_dir / "metrics.jsonl", trainer.output_dir / "metrics.png")
        typer.echo(f"policy, reward model, metrics.jsonl and metrics.png are in {settings.output_dir}")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user did wrong, or a loss that diverged, ends with its message; anything else keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("r2m").setLevel(logging.INFO)
    # peft calls transformers by names that the latter is retiring: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
