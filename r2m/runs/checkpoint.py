"""The folder of a run: who may write to it, and the states from which the run goes on as if it had never stopped.

A checkpoint is complete or it is not there: it is written under another name, flushed to the disk, and renamed. It
holds the policy's trainable weights (all of them, or the adapter), the reward model's part, both optimizers and
schedules, the resolved config, and what identifies the models and prompts the run started from. The position in the
data and the random numbers are functions of the seed and the round and need no saving.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from r2m import processes
from r2m.config import R2MConfig, config_items, config_to_yaml, load_config
from r2m.data.sources import Prompt
from r2m.devices import resolve_precision
from r2m.method.reward_model import WEIGHTS_FILE
from r2m.preferences.store import FreshLabels
from r2m.progress import waiting
from r2m.runs.folder import MANIFEST, METRICS, best_round, checkpoints, read_manifest, read_metrics
from r2m.scoring import Scorer

logger = logging.getLogger(__name__)

MOMENTS = "optimizer.safetensors"  # tensors of the policy's optimizer
UNFINISHED = ".unfinished-"  # prefix of a folder that is being written or removed

# What a resumed run may change: where things lie (their content is compared instead), what is measured and kept, and
# what decides only how the work is laid out. Everything else would make it another run: T, for one, is in w(t).
MAY_CHANGE = [
    "policy", "policy_revision", "reward_model", "reward_model_revision", "prompts", "columns", "skip_invalid",
    "output_dir", "trust_remote_code", "micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "trackers",
    "generation.batch_size", "evaluation.*", "checkpoints.*", "placement.*", "preferences.wait",
]  # fmt: skip


@dataclass
class RunState:
    """What a checkpoint saves and restores, and what tells a run from others."""

    config: R2MConfig
    scorer: Scorer  # with the policy, the reward model, its updater
    schedules: list[LambdaLR]  # of the policy's learning rate and, where it is trained, the reward model's
    prompts: list[Prompt]
    prompt_ids: list[list[int]]  # their tokens
    labels: FreshLabels | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # metrics.jsonl's rows, one a round

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What a run starts from beside its config, none of which changes: frozen weights, revisions, prompts."""
        config, learner, backbone = self.config, self.scorer.learner, self.scorer.reward_model.backbone
        trained = {id(p) for p in learner.parameters}
        with learner.reference() as reference:
            frozen = [(name, p) for name, p in processes.named_parameters(reference) if id(p) not in trained]
            policy = fingerprint(frozen)
        models = {
            "policy": {"name": config.policy, "commit": _commit(learner.policy)},
            "reward_model": {"name": config.reward_model, "commit": _commit(backbone)},
        }
        models["policy"]["fingerprint"] = policy
        models["reward_model"]["fingerprint"] = fingerprint(backbone.named_parameters())
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {"models": models, "prompts": {"count": len(self.prompts), "sha256": prompts}}


# ---- the folder ----


@contextmanager
def claim(folder: str | Path) -> Iterator[Path]:
    """Make `folder` where it is missing and keep other processes from running in it.

    The operating system gives the lock back when the process dies, however it dies. Raises OSError if the folder cannot
    be written, or if another run has it.
    """
    folder = Path(folder)
    if processes.index():  # the first of several writes for all
        yield folder
        return
    # One object a process, so that a command can claim the folder before it loads models, and the trainer again.
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    with made(folder, "output_dir", spare=".lock"):
        try:
            lock.acquire()
        except Timeout:
            raise OSError(f"output_dir {folder}: another run is writing there; wait for it or choose another") from None
        except OSError as error:
            raise OSError(f"output_dir {folder} cannot be written: {error}") from None
        try:
            yield folder
        finally:
            lock.release()


@contextmanager
def made(folder: Path, key: str, *, spare: str = "") -> Iterator[None]:
    """Make `folder`, and the folders it lies in, where they are missing; those made here that are still empty when the
    block ends are removed.

    key: what errors call the folder; spare: the name of a file that counts as nothing. Raises OSError if the folder
    cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"{key} {folder} cannot be written: {error}") from error
        yield
    finally:
        for path in missing:
            if path.is_dir() and {file.name for file in path.iterdir()} <= {spare}:
                if spare:
                    (path / spare).unlink(missing_ok=True)
                with suppress(OSError):  # another process has just put something there
                    path.rmdir()


@contextmanager
def new_folder(folder: Path, key: str = "output") -> Iterator[None]:
    """Make `folder`, in which nothing may lie, for the block to fill. If the block fails or is interrupted, the folder
    is as it was: not there, or empty. Raises ValueError if something lies in it, OSError if it cannot be written."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{key} {folder} is not empty; expected a new folder")
    with made(folder, key):
        try:
            yield
        except BaseException:
            for path in list(folder.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def cut_back(folder: Path, first_round: int) -> list[dict[str, Any]]:
    """Take the rounds from `first_round` on out of the folder, to be run again; returns the rows of those before."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for t, checkpoint in checkpoints(folder).items():
        if t >= first_round:
            logger.info("round %d is run again: %s is removed", t, checkpoint)
            _remove(checkpoint)
    rows = [row for row in read_metrics(folder) if row["round"] < first_round]
    scratch = folder / f"{UNFINISHED}{METRICS}"
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scratch.replace(folder / METRICS)
    return rows


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # on disk before a checkpoint that counts on it


def how_to_go_on(folder: Path) -> str:
    """The last checkpoint of a run that stopped, and the command that goes on from it."""
    last = max(checkpoints(folder).items(), default=(0, None))[1]
    launch = "r2m" if processes.number() == 1 else "accelerate launch ... -m r2m.cli"
    command = f"{launch} train --config {shlex.quote(str(folder / 'config.yaml'))} --resume"
    if last is None:
        return f"there is no checkpoint; to start again: {command}"
    return f"the last checkpoint is {last}; to go on from it: {command}"


# ---- saving ----


def save_checkpoint(run: RunState, t: int) -> Path:
    """Write `checkpoint-<t>`, everything that round t + 1 needs, and drop the checkpoints that are not to be kept.

    Raises FloatingPointError if a weight is not finite and OSError if the disk is full or cannot be written; either way
    the checkpoints before it stay.
    """
    start, folder, scorer, learner = time.perf_counter(), run.folder, run.scorer, run.scorer.learner
    target, scratch = folder / f"checkpoint-{t}", folder / f"{UNFINISHED}checkpoint-{t}"
    weights, (moments, optimizer) = learner.trained_weights(), _tensors_apart(learner.optimizer.state_dict())
    state = {
        "optimizer": optimizer,
        "updater": scorer.updater.state_dict(),
        "schedules": [schedule.state_dict() for schedule in run.schedules],
        "initial_head": scorer.initial_head.state_dict(),
        "labels": None if run.labels is None else run.labels.state_dict(),
    }
    origin = run.origin
    for name, value in weights.items():
        if not torch.isfinite(processes.part(value)).all():
            raise FloatingPointError(f"phase checkpoint, round {t}: the policy's weight {name} is not finite")
    try:
        if processes.index() == 0:
            _check_space(folder, sum(map(_size, (weights, moments, state, scorer.reward_model.state_dict()))))
            scratch.mkdir()
        with waiting(f"writing {target}"):
            _write(scratch / "policy.safetensors", weights)
            _write(scratch / MOMENTS, moments)
            if processes.index():
                return target
            scorer.reward_model.save_pretrained(scratch / "reward_model")
            torch.save(state, scratch / "state.pt")
        (scratch / "config.yaml").write_text(config_to_yaml(run.config))
        files = [path for path in scratch.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
        manifest = {"round": t, "processes": processes.number(), "files": sizes, **origin}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*files, scratch / MANIFEST, scratch / "reward_model", scratch):
            _flush(path)
        scratch.rename(target)
        _flush(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"the checkpoint of round {t} cannot be written to {folder}: {error}") from error
    logger.info(
        "checkpoint-%d: %.1f MiB in %.2f s", t, sum(sizes.values()) / 2**20, time.perf_counter() - start
    )  # fmt: skip
    _prune(folder, keep=run.config.checkpoints.keep, best=best_round(run.history))
    return target


def _tensors_apart(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: its tensors as "<parameter's number>.<name>", and the rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for i, values in state["state"].items():
        tensors |= {f"{i}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        rest[i] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    return tensors, state | {"state": rest}


def _tensors_back(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {i: dict(values) for i, values in rest["state"].items()}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state[int(i)][name] = value
    return rest | {"state": state}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of float32 tensors, which may be sharded. One after the other is gathered and written, so no
    process holds more than one of them whole. All take part; the first writes.

    The format (huggingface.co/docs/safetensors): the length of a header in 8 bytes, the header in JSON, the values.
    """
    header, end = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
        end += 4 * value.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values are aligned
    with path.open("wb") if processes.index() == 0 else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            whole = processes.full(value.detach())
            if file:
                file.write(whole.float().cpu().contiguous().numpy().data)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and up to 64 evenly spaced values of each weight: tells models apart without reading
    them whole."""
    digest = hashlib.sha256()
    for name, p in weights:
        values = processes.full(p).detach().reshape(-1)
        picked = values[:: max(1, len(values) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(p.shape)} ".encode() + picked.numpy().tobytes())
    return digest.hexdigest()


# ---- restoring ----


def checkpoint_to_resume(config: R2MConfig, resume_from: str | Path) -> Path | None:
    """The folder `resume_from`, or for "last" the newest checkpoint in output_dir, None where there is none.

    Raises FileNotFoundError if it is no checkpoint, and ValueError if it is damaged or of a run with other settings.
    """
    found: str | Path | None = resume_from
    if resume_from == "last":
        found = max(checkpoints(config.output_dir).items(), default=(0, None))[1]
    if found is None:
        return None
    read_manifest(Path(found))
    _check_config(load_config(Path(found) / "config.yaml"), resolve_precision(config))
    return Path(found)


def load_checkpoint(run: RunState, folder: str | Path, *, to_train: bool = True, key: str = "resume_from") -> int:
    """Restore `folder` into the state of a run from the same initial models and prompts; returns its round.

    to_train: with the state of optimizers and schedules; without, the policy's is not read from the disk.
    key: what errors name, the option or argument that chose the folder.

    Raises what `checkpoint_to_resume` does, and ValueError if it is of other models or prompts; then the state is
    unchanged.
    """
    folder, scorer, learner = Path(folder), run.scorer, run.scorer.learner
    manifest = read_manifest(folder, key)
    _check_config(load_config(folder / "config.yaml"), run.config)
    _check_origin(folder, manifest, run.origin, key)
    # On the host a file is mapped, and read where it is used: of a sharded policy, a part by each process.
    saved, own = load_file(folder / "policy.safetensors"), learner.trained_weights()
    if {name: p.shape for name, p in saved.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(f"{key}: the trainable weights in {folder} are not those of this policy")
    state = torch.load(folder / "state.pt", map_location=learner.device, weights_only=True)
    part = load_file(folder / "reward_model" / WEIGHTS_FILE, device=str(learner.device))
    scorer.reward_model.load_state_dict(part)
    for name, value in saved.items():
        own[name].copy_(processes.like(value, own[name]))
    scorer.initial_head.load_state_dict(state["initial_head"])
    scorer.updater.load_state_dict(state["updater"], to_train=to_train)
    if not to_train:
        return manifest["round"]
    if run.labels is not None:
        run.labels.load_state_dict(state["labels"])
    optimizer = _tensors_back(load_file(folder / MOMENTS), state["optimizer"])
    learner.optimizer.load_state_dict(processes.optimizer_state_like(optimizer, learner.parameters))
    for schedule, values in zip(run.schedules, state["schedules"], strict=True):
        schedule.load_state_dict(values)
    if manifest["processes"] != processes.number():
        logger.warning(
            "%s is of %d processes, and this run has %d: each draws random numbers of its own, so from here on its "
            "responses are others than %d processes would draw",
            folder, manifest["processes"], processes.number(), manifest["processes"],
        )  # fmt: skip
    return manifest["round"]


def _check_config(saved: R2MConfig, given: R2MConfig) -> None:
    old, new = config_items(saved), config_items(given)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE):
            reason = " and w(t) depends on it" if key == "rounds" else ""
            raise ValueError(
                f"{key} is {new.get(key)!r}, the checkpoint's run has {old.get(key)!r}{reason}; "
                f"a resumed run may change only {', '.join(MAY_CHANGE)}"
            )


def _check_origin(folder: Path, saved: dict[str, Any], own: dict[str, Any], key: str) -> None:
    for kind, model in saved["models"].items():
        if model["fingerprint"] != own["models"][kind]["fingerprint"]:
            revision = f" at {model['commit']}" if model["commit"] else ""
            raise ValueError(
                f"{key}: {folder} is of another model: its run started from {kind} {model['name']}{revision}, "
                f"whose frozen weights are not those of {own['models'][kind]['name'] or 'the one given'}"
            )
    if saved["prompts"] != own["prompts"]:
        raise ValueError(
            f"{key}: {folder} is of a run on {saved['prompts']['count']} usable prompts; "
            f"the {own['prompts']['count']} given are not the same"
        )


# ---- disk ----


def _prune(folder: Path, *, keep: int, best: int | None) -> None:
    found = checkpoints(folder)
    for t in list(found)[:-keep]:
        if t != best:
            _remove(found[t])


def _remove(checkpoint: Path) -> None:
    """Renamed first: what is left of it after a kill does not look like a checkpoint."""
    doomed = checkpoint.with_name(f"{UNFINISHED}old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")


def _size(state: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return sum(map(_size, values))


def _commit(model: Any) -> str | None:
    return getattr(model.config, "_commit_hash", None)
