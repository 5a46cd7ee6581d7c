"""Memory and seconds of the paper's setups, as `r2m doctor` computes them, into docs/operations.md.

python benchmarks/estimates.py            # after a change of the estimate or of a preset
python benchmarks/estimates.py --check    # writes nothing; exit 1 if the page shows other figures
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from r2m.commands.memory import estimate_memory
from r2m.commands.seconds import GPUS, estimate_seconds
from r2m.config import R2MConfig, load_config
from r2m.presets import preset_path

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- estimates: begin -->", "<!-- estimates: end -->"

# The numbers of the checkpoints' config.json, so that no hub is asked.
LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_3 = LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"])
SKYWORK = LlamaConfig(**LLAMA, num_labels=1, architectures=["LlamaForSequenceClassification"])
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
PYTHIA = GPTNeoXConfig(
    vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
    tie_word_embeddings=False,
)  # fmt: skip
MODELS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {  # preset -> policy, reward model
    "paper-dialogue-llama3-8b": (LLAMA_3, SKYWORK),
    "paper-dialogue-qwen2.5-3b": (QWEN, SKYWORK),
    "paper-tldr-pythia-2.8b": (PYTHIA, PYTHIA),
}

SHARDED = ["placement.shard_policy=true", "placement.offload_reference=false"]
RUNS: list[tuple[str, int, list[str]]] = [  # GPU, processes, overrides of the preset
    ("h200", 1, []),
    ("h100", 8, SHARDED),
    ("h100", 8, [*SHARDED, "generation.engine=vllm"]),
]
PHASES = ["start", "rollout", "annotate", "policy", "reward_model", "evaluation", "checkpoint"]
TIMED = PHASES[1:5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    check = parser.parse_args().check
    old = PAGE.read_text()
    new = page(old)
    if check and new != old:
        sys.exit(f"{PAGE}: not what the estimate says; run python benchmarks/estimates.py")
    PAGE.write_text(new)


def page(text: str) -> str:
    """`text` with the tables of now between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no {BEGIN} ... {END}; expected these lines where the tables belong")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def tables() -> str:
    logging.getLogger("r2m").setLevel(logging.WARNING)  # says which precision was chosen
    memory, seconds = list[str](), list[str]()
    for preset, gpu, number, overrides, config in runs():
        shown = [gpu if number == 1 else f"{number} x {gpu}", preset.removeprefix("paper-"), _keys(overrides)]
        peaks = estimate_memory(config, number).phases
        time = estimate_seconds(config, GPUS[gpu], number)
        fits = "yes" if max(peaks.values()) <= GPUS[gpu].memory else "**no**"
        memory.append(_row(*shown, *(f"{peaks[phase] / 2**30:.1f}" for phase in PHASES), fits))
        parts = (f"{time.phases[phase]:.3g}" for phase in TIMED)
        seconds.append(
            _row(*shown, *parts, f"{time.round:.3g}", f"{time.r2m:.2g} ({100 * time.r2m / time.round:.1g} %)")
        )
    head = ["GPUs", "setup", "keys"]
    return "\n".join(
        [
            "Peak memory of a GPU in GiB:\n",
            *_table([*head, *PHASES, "fits"], memory),
            "\nSeconds of a round, without evaluation and checkpoints:\n",
            *_table([*head, *TIMED, "round", "of it R2M"], seconds),
        ]
    )


def runs() -> Iterator[tuple[str, str, int, list[str], R2MConfig]]:
    """(preset, GPU, processes, overrides, the config) of every row."""
    with tempfile.TemporaryDirectory() as folder:
        for preset, models in MODELS.items():
            named = []
            for key, model in zip(("policy", "reward_model"), models, strict=True):
                model.save_pretrained(f"{folder}/{preset}/{key}")
                named.append(f"{key}={folder}/{preset}/{key}")
            for gpu, number, overrides in RUNS:
                config = load_config(preset_path(preset), [*named, *overrides, "placement.device=cuda"])
                yield preset, gpu, number, overrides, config


def _keys(overrides: list[str]) -> str:
    short = {"placement.shard_policy=true": "sharded", "generation.engine=vllm": "vLLM"}
    return ", ".join(short[key] for key in overrides if key in short) or "as it is"


def _table(head: list[str], rows: list[str]) -> list[str]:
    return [_row(*head), _row(*["---"] * len(head)), *rows]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
