"""R2M: reward models that see the policy's own hidden states, trained in step with it."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from r2m.config import R2MConfig

# The heavy imports live inside the commands, behind the checks of what the user wrote: neither `r2m --help` nor a
# mistake should wait for torch.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_debug = False  # --debug, for `_clear_errors`

Columns = Annotated[list[str] | None, typer.Option(help="field=its name in the data: prompt=question")]


def _show_version(asked: bool) -> None:
    if asked:
        (distribution, *_) = metadata.packages_distributions().get("r2m", [""])
        typer.echo(f"r2m {metadata.version(distribution) if distribution else '(not installed)'}")
        raise typer.Exit()


@app.callback(help=__doc__)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Before a command: show where an error was raised.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds of each arm.")] = 16,
    seed: Annotated[int, typer.Option(help="Of labelled pairs, weights and sampling.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for metrics, samples, table and plots.")] = Path("runs/demo"),
) -> None:
    """Train a small language model on movie reviews, on the CPU: it exploits a fixed reward model; the same with fresh
    labels, and with R2M."""
    with _clear_errors():
        with _loading():
            from r2m.demo.run import run_demo

        run_demo(rounds=rounds, seed=seed, output=output)


@app.command()
def train(
    config: Annotated[str, typer.Option(help="YAML file, every key a field of r2m.R2MConfig; or a preset's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dots reach into blocks: r2m.floor=0.7")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir, or start if there is none.")
    ] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this folder checkpoint-<round>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run one tiny round, print the config, stop.")
    ] = False,
) -> None:
    """Train a policy with R2M; policy and reward model are saved in the config's output_dir."""
    with _clear_errors():
        from r2m.runs.folder import check_unused, read_manifest

        if resume and resume_from is not None:
            raise ValueError("--resume and --resume-from are both given; expected one of them")
        settings = _read_config(config, overrides, "policy", "reward_model", "prompts")
        if resume_from is not None:
            read_manifest(resume_from, "--resume-from")
        elif not resume and not dry_run:
            check_unused(settings.output_dir)

        with _loading():
            from r2m import processes
            from r2m.commands import train as runs

        text = runs.dry_run(settings) if dry_run else runs.run(settings, "last" if resume else resume_from)
        if processes.index() == 0:
            typer.echo(text)
        processes.stop()


@app.command()
def fit_reward(
    pairs: Annotated[str, typer.Option(help="Preference pairs: .jsonl, .csv, a saved dataset, or one of the hub.")],
    reward_model: Annotated[str, typer.Option(help="Sequence-classification checkpoint or causal LM, hub id or path.")],
    output: Annotated[Path, typer.Option(help="New folder for the fitted reward model, fit.json and calibration.png.")],
    policy: Annotated[
        str | None, typer.Option(help="Whose hidden states R2M attends to; without it only the head is fitted.")
    ] = None,
    held_out: Annotated[str | None, typer.Option(help="Pairs that stop the fit; default: a random tenth.")] = None,
    columns: Columns = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out and count ties, empty responses and other rows.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=0, help="Adapter of the backbone, merged; 0: it stays frozen.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of the adapter.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in one forward pass.")] = 16,
    keep_head: Annotated[
        bool, typer.Option("--keep-head", help="Leave the checkpoint's head as it is: fit the cross-attention alone.")
    ] = False,
    max_epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pairs in each stage; default 2000 steps, or 5 passes.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="A stage ends once its held-out loss falls by less than this share; 0.005.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens; longer pairs are dropped. Default 2048.")
    ] = None,
    rte_token: Annotated[str | None, typer.Option(help="Token read: checkpoint (default) or last.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Put behind every text that is no chat.")] = None,
    inner_width: Annotated[int | None, typer.Option(min=1, help="Of the cross-attention; default 2048.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Of the cross-attention; default 1.")] = None,
    floor: Annotated[float | None, typer.Option(min=0, max=1, help="Omega, w outside training; default 0.6.")] = None,
    standardize: Annotated[
        bool | None,
        typer.Option("--standardize/--no-standardize", help="RTEs and hidden states, per feature; default no."),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Hidden states attended to: all (default) or response, as r2m.positions.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, weights and minibatches.")] = 0,
    reward_model_revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub.")] = None,
    policy_revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code that comes with a checkpoint.")] = False,
) -> None:
    """Fit a reward model on preference pairs: linear head, on request LoRA, and with a policy R2M's cross-attention.

    The output folder is a checkpoint for AutoModelForSequenceClassification, and with a policy also for r2m train.
    """
    with _clear_errors():
        names = _columns(columns)
        _check_sources(("--pairs", pairs), ("--held-out", held_out), pairs=True)
        _check_models(("--reward-model", reward_model), ("--policy", policy))

        with _loading():
            import transformers

            from r2m import processes
            from r2m.commands.fit_reward import fit_reward_from_files

        processes.start(timeout_minutes=30)
        transformers.logging.set_verbosity_error()  # the head is new on purpose
        settings: dict[str, Any] = {
            "max_length": max_length,
            "rte_token": rte_token,
            "suffix": suffix,
            "inner_width": inner_width,
            "num_heads": num_heads,
            "floor": floor,
            "standardize": standardize,
            "positions": positions,
            "tolerance": tolerance,
        }
        report = fit_reward_from_files(
            pairs,
            reward_model,
            output,
            policy=policy,
            held_out=held_out,
            columns=names,
            skip_invalid=skip_invalid,
            reward_model_revision=reward_model_revision,
            policy_revision=policy_revision,
            trust_remote_code=trust_remote_code,
            lora_rank=lora_rank,
            learning_rate=learning_rate,
            batch_size=batch_size,
            keep_head=keep_head,
            max_epochs=max_epochs,
            seed=seed,
            **{name: value for name, value in settings.items() if value is not None},
        )
        if processes.index() == 0:
            for name, value in report.items():
                typer.echo(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
            typer.echo(f"reward model, fit.json and calibration.png are in {output}")
        processes.stop()


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run with checkpoints.")],
    checkpoint: Annotated[str, typer.Option(help="last, best (by the judge) or a round.")] = "last",
    prompts: Annotated[str, typer.Option(help="Held-out prompts; default: the run's evaluation.prompts.")] = "",
    pairs: Annotated[str, typer.Option(help="Held-out pairs; default: the run's evaluation.pairs.")] = "",
    judge: Annotated[str, typer.Option(help="module:function; default: the run's evaluation.judge.")] = "",
    columns: Columns = None,
) -> None:
    """Rewards, judge, KL, lengths, pair accuracy and samples of a run's policy on held-out prompts."""
    with _clear_errors():
        from r2m.runs.folder import run_to_evaluate

        given = {"prompts": prompts, "pairs": pairs, "judge": judge, "columns": _columns(columns)}
        measured: dict[str, Any] = {name: value for name, value in given.items() if value}
        run_to_evaluate(run, checkpoint, **measured)

        with _loading():
            from r2m.commands.evaluate import evaluate_run

        typer.echo(evaluate_run(run, checkpoint, **measured))


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="The output_dir of a run.")]) -> None:
    """Draw a run's curves anew from its metrics.jsonl."""
    with _clear_errors():
        _check_run(run)

        from r2m.plots import plot_run

        plot_run(run / "metrics.jsonl", run / "metrics.png")
        typer.echo(f"{run / 'metrics.png'}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the run's folder.")] = None,
) -> None:
    """Write one HTML file of a run: curves, warnings, best and worst samples a round, labels."""
    with _clear_errors():
        from r2m.commands.report import report_run

        typer.echo(f"{report_run(run, output)}")


@app.command()
def label(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run with preferences.labeller: queue.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; all but this machine's own ask for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
) -> None:
    """Open a web page on which people label a run's pairs, while it trains or later."""
    with _clear_errors():
        from r2m.commands.label import label as serve

        typer.echo(serve(run, host, port))


@app.command()
def diagnose(
    source: Annotated[str, typer.Argument(help="YAML file or preset of a run to come, or output_dir of one that ran.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dots reach into blocks: r2m.floor=0.7")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="Preference pairs, needed for a run to come.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Pairs to measure on; default: a random half.")] = None,
    max_pairs: Annotated[int | None, typer.Option(min=10, help="Drawn from either where more; default 1024.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder; default: diagnosis/before, or after, in output_dir.")
    ] = None,
) -> None:
    """Before a run: what policy feedback does on your models and pairs. After it: whether rewards degenerated."""
    with _clear_errors():
        given = {"held_out": held_out, "max_pairs": max_pairs}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if Path(source).is_dir():
            if overrides or pairs is not None or options:
                raise ValueError(f"{source} is a run's folder: it takes --output alone; pairs are for a config")
            _check_run(Path(source))

            with _loading():
                from r2m.commands import diagnose as diagnoses

            typer.echo(diagnoses.diagnose_run(source, output))
        elif pairs is None:
            raise ValueError(f"--pairs is missing; {source} is no folder of a run, and a config needs preference pairs")
        else:
            _check_sources(("--pairs", pairs), ("--held-out", held_out), pairs=True)
            settings = _read_config(source, overrides, "policy", "reward_model", data=False)

            with _loading():
                from r2m.commands import diagnose as diagnoses

            typer.echo(diagnoses.diagnose_config(settings, pairs, output, **options))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
    output: Annotated[Path, typer.Option(help="New folder: policy, tokenizer, model card and reward_model.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="best (by the judge), last or a round; default: the policy at the run's end.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put the adapter into the model; the folder then loads without peft.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this repository, owner/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository has to be private.")] = False,
) -> None:
    """Write a run's policy and reward model as from_pretrained and the Hugging Face hub expect them."""
    with _clear_errors():
        from r2m.runs.folder import find_checkpoint, read_run

        if private and push_to_hub is None:
            raise ValueError("--private is given without --push-to-hub")
        read_run(run)
        if checkpoint is not None:
            find_checkpoint(run, checkpoint)

        with _loading():
            from r2m.commands import export as exports

        typer.echo(
            f"policy and reward model are in {exports.export_run(run, output, checkpoint=checkpoint, merge=merge)}"
        )
        if push_to_hub is not None:
            typer.echo(f"uploaded to {exports.push_to_hub(output, push_to_hub, private=private)}")


@app.command()
def presets() -> None:
    """List the configs that come with the package, for r2m train --config NAME."""
    from r2m.presets import list_presets

    for preset in list_presets():
        typer.echo(f"{preset.name}\n  {preset.summary}\n  {preset.hardware}\n  {preset.status}")


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Option(help="YAML file or a preset's name: estimate the memory of its run.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="That the run has, a GPU each.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 or h200: estimate for it, and a round's seconds.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dots reach into blocks: r2m.floor=0.7")
    ] = None,
) -> None:
    """Show versions, devices and operators of this machine and, with a config, whether its run fits into memory."""
    with _clear_errors():
        settings = None
        if config or overrides:
            settings = _read_config(config, overrides, "policy", "reward_model", data=False, head=False)

        with _loading():
            from r2m.commands.doctor import report

        typer.echo(report(settings, number=processes, gpu=gpu))


@app.command()
def bench(
    policy: Annotated[str | None, typer.Option(help="Hub id or path; its hidden size is D_p. Default: 4096.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Hub id or path; its hidden size is D_rm. Default: 4096.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 16,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 1024,
    inner_width: Annotated[int, typer.Option(min=1, help="Of the cross-attention.")] = 2048,
    heads: Annotated[int, typer.Option(min=1, help="Of the cross-attention.")] = 1,
    responses: Annotated[int, typer.Option(min=2, help="To each prompt, K; divides the batch.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of hidden states: bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there, else cpu.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each provider and mode.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compiled", help="Measure torch.compile, too.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for bench.json, bench.csv and bench.png.")] = Path("bench"),
) -> None:
    """Time the reward, its pool and the reward model's update on this machine, beside plain PyTorch."""
    with _clear_errors():
        _check_models(("--policy", policy), ("--reward-model", reward_model))

        with _loading():
            from r2m.commands.bench import bench_models

        bench_models(
            policy,
            reward_model,
            batch=batch,
            seq=seq,
            inner_width=inner_width,
            heads=heads,
            responses=responses,
            dtype=dtype,
            device=device,
            seconds=seconds,
            compiled=compiled,
            output=output,
            command=f"r2m {shlex.join(sys.argv[1:])}",
        )


def _read_config(source: str | None, overrides: list[str] | None, *keys: str, **checks: bool) -> R2MConfig:
    """A command's config, with `keys` set and names checked. checks: see `r2m.config.check_names`."""
    from r2m.config import check_names, load_config, require_keys
    from r2m.presets import resolve_config_source

    config = load_config(None if source is None else resolve_config_source(source), overrides)
    require_keys(config, *keys)
    check_names(config, **checks)
    return config


def _loading() -> AbstractContextManager[None]:
    """Around imports that take seconds."""
    from r2m.progress import waiting

    return waiting("loading PyTorch and transformers")


def _check_models(*options: tuple[str, str | None]) -> None:
    from r2m.names import check_model, named

    for option, name in options:
        named(option, check_model, name or "")


def _check_sources(*options: tuple[str, str | Path | None], pairs: bool = False) -> None:
    from r2m.names import check_source, named

    for option, name in options:
        named(option, check_source, str(name or ""), pairs=pairs)


def _check_run(folder: Path) -> None:
    from r2m.runs.folder import METRICS, read_metrics

    if not read_metrics(folder):
        raise FileNotFoundError(f"{folder} holds no {METRICS} with a round; expected the output_dir of a run")


def _columns(items: list[str] | None) -> dict[str, str]:
    from r2m.names import check_columns

    for item in items or []:
        if "=" not in item:
            raise ValueError(f"--columns {item}: expected field=name")
    columns = dict(item.split("=", 1) for item in items or [])
    check_columns("--columns", columns)
    return columns


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user did wrong, or a loss that diverged, ends with its message; anything else, and with `--debug` all,
    keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("r2m").setLevel(logging.INFO)
    # peft calls transformers, and vLLM torch, by names that the latter are retiring: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|vllm")
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if _debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
