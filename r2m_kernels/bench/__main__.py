"""Times the reward, its pool and the reward model's update for one shape, beside plain PyTorch.

    python -m r2m_kernels.bench --shape B=64 S=1024 D_p=2048 D_rm=4096

B sequences of S tokens, in groups of K; D_p and D_rm are the widths of policy and reward model, d and heads those of
the cross-attention. Prints tables; writes bench.json, bench.csv and, with matplotlib, bench.png into --output.
"""

import argparse
import shlex
import sys
from pathlib import Path

from r2m_kernels.bench import bench_shape

SHAPE = {"B": 16, "S": 1024, "D_p": 4096, "D_rm": 4096, "d": 2048, "heads": 1, "K": 8}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m r2m_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = " ".join(f"{name}={size}" for name, size in SHAPE.items())
    parser.add_argument("--shape", nargs="+", type=_size, default=[], metavar="NAME=SIZE", help=f"default: {default}")
    parser.add_argument("--dtype", default="bfloat16", help="of hidden: bfloat16, float16 or float32")
    parser.add_argument("--device", help="default: cuda if there, else cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each provider and mode")
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="a folder")
    arguments = parser.parse_args()
    shape = SHAPE | dict(arguments.shape)
    try:
        bench_shape(
            "one shape",
            shape["D_p"],
            shape["D_rm"],
            batch=shape["B"],
            seq=shape["S"],
            inner_width=shape["d"],
            heads=shape["heads"],
            responses=shape["K"],
            dtype=arguments.dtype,
            device=arguments.device,
            seconds=arguments.seconds,
            compiled=arguments.compiled,
            output=arguments.output,
            command=f"python -m r2m_kernels.bench {shlex.join(sys.argv[1:])}",
        )
    except ValueError as error:
        parser.error(str(error))


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if name not in SHAPE or not size.isdecimal() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SHAPE)} and a size, as in S=1024, got {text!r}")
    return name, int(size)


if __name__ == "__main__":
    main()
