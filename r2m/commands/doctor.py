"""What this machine has and, for a config, whether its run fits into memory and how long a round takes on a GPU."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata

import torch

from r2m.batching import Tokens
from r2m.commands.memory import MemoryEstimate, estimate_memory, sequences_at_once
from r2m.commands.seconds import BYTES_USED, FLOPS_USED, GPUS, estimate_seconds
from r2m.config import R2MConfig
from r2m.devices import native_bfloat16, policy_device
from r2m.progress import waiting
from r2m_kernels import __version__, build, dispatch
from r2m_kernels.bench import measure

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft")
_OPTIONAL = ("flash_attn", "bitsandbytes", "datasets", "tensorboard", "wandb", "trackio")
_GIB = 2**30


def report(config: R2MConfig | None = None, *, number: int = 1, gpu: str | None = None) -> str:
    """Versions, devices, implementations of the operators and compilers; with a config, the memory of each of `number`
    processes, on this machine or on GPUs of the kind `gpu`, and on these the seconds of a round.

    Raises ValueError for a kind of GPU that is not known, and ValueError or OSError as `estimate_memory` does.
    """
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"--gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    if config is None and (gpu is not None or number > 1):
        raise ValueError("--gpu and --processes are about a run; expected --config with them")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    sections = [
        ("versions", _versions()),
        ("devices", [_device(name) for name in devices]),
        ("operators", [line for name in devices for line in _implementations(name)]),
        ("compilers for the extension", _compilers()),
    ]
    if config is not None:
        if gpu is not None:
            config = dataclasses.replace(config, placement=dataclasses.replace(config.placement, device="cuda"))
        sections.append(("memory", _memory(config, number, gpu)))
        if gpu is not None:
            sections.append(
                (f"seconds of a round on {number} x {gpu}, computed from its peaks", _seconds(config, number, gpu))
            )
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _versions() -> list[str]:
    built_for = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    lines = [f"python {platform.python_version()}", f"r2m-kernels {__version__}"]
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed" + (" (optional)" if name in _OPTIONAL else "")
        if name == "torch":
            version += f", built for {built_for if torch.version.hip or torch.version.cuda else 'CPU alone'}"
        lines.append(f"{name} {version}")
    return lines


def _device(name: str) -> str:
    if name == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cores = len(os.sched_getaffinity(0))
        products = "native" if native_bfloat16("cpu") else "no native"
        return (
            f"cpu: {cores} cores, {total / _GIB:.1f} GiB memory, {free_memory('cpu') / _GIB:.1f} GiB free, "
            f"{products} bfloat16 products"
        )
    properties = torch.cuda.get_device_properties(name)
    return (
        f"{name}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / _GIB:.1f} GiB memory, {free_memory(name) / _GIB:.1f} GiB free"
    )


def free_memory(device: torch.device | str) -> float:
    """Bytes; inf where the device is not of this machine."""
    device = torch.device(device)
    here = torch.cuda.is_available() and device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    return measure.free_memory(device) if here or device.type == "cpu" else float("inf")


def _implementations(device: str) -> list[str]:
    tensor = torch.empty(0, device=device)
    lines = [f'{device}: impl="auto" takes {dispatch.choose("auto", tensor)}']
    for name in dispatch.IMPLEMENTATIONS:
        try:
            dispatch.choose(name, tensor)
            lines.append(f"  {name}: can run")
        except RuntimeError as error:
            lines.append(f"  {name}: {str(error).partition('cannot run: ')[2]}")
    return lines


def _compilers() -> list[str]:
    lines = []
    for name, find in (("C++", build.find_cxx), ("CUDA", build.find_nvcc), ("ninja", build.find_ninja)):
        try:
            lines.append(f"{name}: {find()}")
        except build.BuildError as error:
            lines.append(f"{name}: {error}")
    return lines


def _memory(config: R2MConfig, number: int, gpu: str | None) -> list[str]:
    device, of_each = policy_device(config), f", of each of {number} processes" if number > 1 else ""
    try:
        with waiting("estimating memory"):
            estimate = estimate_memory(config, number)
    except RuntimeError as error:
        return [f"cannot be estimated, since these models cannot be made without their weights: {error}"]
    lines = [f"parts on {gpu or device}, the policy's device{of_each}, in GiB"]
    lines += [f"  {size / _GIB:8.2f}  {part}" for part, size in estimate.parts.items()]
    lines += ["peak of each phase in GiB, every response at its greatest length"]
    lines += [f"  {size / _GIB:8.2f}  {phase}" for phase, size in estimate.phases.items()]
    free = GPUS[gpu].memory if gpu else free_memory(device)
    if device.type == "cpu":
        free /= number  # they share it
    over = [phase for phase, size in estimate.phases.items() if size > free]
    lines.append(_verdict(f"{gpu or device}{of_each}", max(estimate.phases.values()), free, gpu))
    if over:
        lines += ["keys that lower it:", *(f"  {hint}" for hint in _hints(config, number, estimate, over))]
    if estimate.reward_model_device is not None:
        where = str(config.placement.reward_model)
        gpu = None if where == "cpu" else gpu
        free = GPUS[gpu].memory if gpu else free_memory(where)
        lines.append(_verdict(f"{where}, the reward model's", estimate.reward_model_device, free, gpu))
    return lines


def _seconds(config: R2MConfig, number: int, gpu: str) -> list[str]:
    try:
        estimate = estimate_seconds(config, GPUS[gpu], number)
    except RuntimeError:
        return ["cannot be estimated either"]
    lines = [f"{seconds:10.3g}  {phase}" for phase, seconds in (estimate.phases | {"round": estimate.round}).items()]
    return [
        *lines,
        f"{estimate.r2m:10.3g}  of it R2M's own, {100 * estimate.r2m / estimate.round:.2g} %",
        f"at {FLOPS_USED:.0%} of its FLOPs and {BYTES_USED:.0%} of its bandwidths, and full length of every response",
    ]


def _verdict(device: str, peak: float, free: float, gpu: str | None) -> str:
    if free == float("inf"):
        return f"{device}: {peak / _GIB:.2f} GiB at the peak; this machine has no such device to compare with"
    fits = "fits" if peak <= free else "does not fit"
    return f"{device}: {fits}, {peak / _GIB:.2f} GiB at the peak of {free / _GIB:.2f} GiB{'' if gpu else ' free'}"


def _hints(config: R2MConfig, number: int, estimate: MemoryEstimate, phases: list[str]) -> list[str]:
    """Keys that lower the peaks of `phases`, each with the GiB that it is about."""
    parts = {name: f"{size / _GIB:.2f} GiB" for name, size in estimate.parts.items()}
    trains, on_gpu = {"annotate", "policy"} & set(phases), policy_device(config).type != "cpu"
    whole, vllm = config.lora is None and not config.placement.shard_policy, "vLLM cache" in parts
    cache = parts["vLLM cache" if vllm else "generation cache"]
    size = config.generation.batch_size or config.prompts_per_round * config.num_generations
    at_once, micro_batch = config.batch_size, f"micro_batch_size, now {config.micro_batch_size}"
    if isinstance(at_once, Tokens):
        micro_batch = f"micro_batch_tokens, now {at_once.number}"
    trained = sum(estimate.parts[name] for name in ("gradients", "optimizer state", "reference"))
    spread = trained + estimate.parts["policy weights"]
    more = f"placement.shard_policy=true spreads {spread / _GIB:.2f} GiB"
    hints = {
        f"generation.batch_size, now {size}: {cache} of cache": vllm or bool({"rollout", "evaluation"} & set(phases)),
        f"{more} over the {number} processes" if number > 1 else f"--processes: with several, {more} over them": whole
        and (on_gpu or number > 1),
        f"gradient_checkpointing=true: {parts['activations and temporaries']}": trains
        and not config.gradient_checkpointing,
        f"{micro_batch}: {parts['activations and temporaries']}": trains and sequences_at_once(config) > 1,
        f"lora, an adapter: {trained / _GIB:.2f} GiB of gradients, optimizer state and reference": config.lora is None,
        f"placement.offload_reference=true: {parts['reference']}": on_gpu
        and config.lora is None
        and estimate.parts["reference"] > 0,
        f"placement.offload_reward_model, .quantize_reward_model or .reward_model: {parts['reward model backbone']}": (
            on_gpu and estimate.parts["reward model backbone"] > 0
        ),
    }
    return [hint for hint, applies in hints.items() if applies]
