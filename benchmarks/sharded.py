"""Peak memory of each of two processes that share a policy (`placement.shard_policy`), while it starts, saves and
resumes.

    OMP_NUM_THREADS=1 python benchmarks/sharded.py

A policy of random weights, in a checkpoint of float32 or, with --stored bfloat16, of the dtype most have. Counted is
anonymous memory (RssAnon of /proc/self/status, every 5 ms) above what the process has before it loads the policy. Pages
of mapped files are left out: the system drops them where it needs room. The aim is 1.2 times (weights + optimizer +
reference) / processes, and the largest block, which FSDP gathers as one. More is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from r2m import R2MConfig, R2MRewardModel, R2MTrainer, load_policy, processes
from r2m.config import Placement
from r2m.method.reward_model import RewardModelConfig
from r2m.runs.checkpoint import save_checkpoint

PROCESSES = 2
VOCABULARY = 16000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--stored", default="float32", choices=["float32", "bfloat16"], help="dtype of the checkpoint")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a process that this one has started
    args = parser.parse_args()
    if args.folder is not None:
        measure(args.folder)
        return
    with tempfile.TemporaryDirectory() as place:
        folder, shape = Path(place), {"num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 2304}
        config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=args.layers, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.stored))
        model.save_pretrained(folder / "policy")
        sizes = [4 * p.numel() for p in model.parameters()]
        block = 4 * sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
        del model
        aim = 1.2 * 4 * sum(sizes) / PROCESSES + block  # weights, reference, and AdamW's two moments
        print(f"weights {sum(sizes) / 1e6:.0f} MB, largest block {block / 1e6:.0f} MB", flush=True)
        over = False
        for stage in ("start", "resume"):
            for rank, peaks in enumerate(run(folder)):
                for name, peak in peaks.items():
                    over = over or peak > aim
                    print(f"{stage}, process {rank}, {name}: {peak / 1e6:.0f} MB; aim: {aim / 1e6:.0f} MB", flush=True)
        sys.exit("a process took more than the aim" if over else 0)


def run(folder: Path) -> list[dict[str, float]]:
    """Start the processes as torchrun does; returns what each has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # What is freed goes back to the system at once: glibc would keep buffers of a block for later ones.
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": 2**20}
    started = []
    for rank in range(PROCESSES):
        environment = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, __file__, "--folder", str(folder)]
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed: its error is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(folder: Path) -> None:
    """One of the processes: prints the peaks of what it does, in bytes."""
    checkpoints = list(folder.glob("run/checkpoint-*"))
    config = R2MConfig(
        policy=str(folder / "policy"),
        output_dir=str(folder / "run"),
        prompts_per_round=PROCESSES,
        num_generations=2,
        precision="float32",
        placement=Placement(shard_policy=True),
    )
    torch.manual_seed(0)
    processes.start(config.placement.timeout)
    reward_model, tokenizer = small_reward_model()
    peaks: dict[str, float] = {}
    before = anonymous()
    with peak_in(peaks, "until the first round", before):
        policy = load_policy(config)
        trainer = R2MTrainer(policy, reward_model, tokenizer, ["w5 w6 w7"] * 4, config)
        with trainer.session.open("last" if checkpoints else None):
            pass
    if not checkpoints:
        torch.manual_seed(0)
        for p in trainer.learner.parameters:
            p.grad = torch.rand_like(p)
        trainer.learner.step(1, 1)
        with peak_in(peaks, "saving", before):
            save_checkpoint(trainer.run, 1)
    processes.wait()
    processes.stop()
    print(json.dumps(peaks))


def small_reward_model() -> tuple[R2MRewardModel, PreTrainedTokenizerFast]:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2, 100)} | {"</s>": 1}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    classifier = AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=100, num_labels=1, **sizes))
    config = RewardModelConfig(
        backbone="small",
        backbone_revision=None,
        policy="policy",
        policy_revision=None,
        policy_width=768,
        inner_width=32,
        num_heads=1,
        floor=0.6,
        standardize=False,
        rte_token="last",
        suffix="",
        max_length=2048,
    )
    return R2MRewardModel(classifier, tokenizer, config), tokenizer


def anonymous() -> int:
    """Bytes of this process's memory that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_in(peaks: dict[str, float], name: str, before: int) -> Iterator[None]:
    """Put the most memory above `before` that the block has into `peaks`."""
    over = threading.Event()
    peaks[name] = 0

    def look() -> None:
        while not over.wait(0.005):
            peaks[name] = max(peaks[name], anonymous() - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
