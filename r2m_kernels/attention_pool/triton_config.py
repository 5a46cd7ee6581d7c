"""How the Triton kernels of attention pooling are launched: fixed by D, the number of queries, dtype and architecture.

BS rows and BD columns are a tile, CHUNK the rows of a program, BH its queries; STAGES is the number of tiles in shared
memory and registers together. Nothing depends on the number or the length of sequences.
"""

from typing import Any

import torch

Config = dict[str, Any]

# Of a tile in shared memory: 3 stages keep 2 tiles on their way. An H100's multiprocessor needs 20 KB on their way,
# which small tiles of the few programs that fit beside each other do not reach. Where only scalars are kept, rows are
# cheap, and a small tile lets more programs fit.
LEAST_TILE, MOST_TILE, SCALARS_TILE = 4096, 32 * 1024, 8192
# float32 values in a thread's registers, by number of warps: queries, directions, sums, and its part of a tile. Of 255
# registers, or 128 where 16 warps share 65536, the rest is for intermediates.
VALUES = {1: 200, 2: 200, 4: 200, 8: 200, 16: 80}
# Columns of a row in a thread. What a row costs once a warp, its sums over lanes and its weights, is spread over the
# fewest warps, but 4 warps take more columns each before 8 leave room for one program alone.
COLUMNS = {1: 40, 2: 40, 4: 64, 8: 40, 16: 40}
# Rows of a tile, all its queries together: by then weights cost little beside products, and more would spill.
ROWS = 8
# Wider rows would leave less than one row a tile; more queries than this are cheaper on tensor cores.
WIDEST_ROW, MAX_QUERIES = 8192, 4

# Rows for each query whose pool becomes a partial result, of at most 2 float32 vectors a query: 1/32 of the bytes of
# these rows in 16 bits. The workspace has room for twice as many, see triton_impl; writing and reading it adds 1/16.
CHUNK = 128
# Bytes of a chunk of which only scalars are kept: few, so that one sequence fills a GPU, but enough to make loading the
# query and the direction, 8 D bytes, a small part.
DOT_CHUNK_BYTES = 256 * 1024

# The merge: a sequence of 4096 rows in one tile, of 16 float32 values a thread.
MERGE: Config = {"BC": 32, "BD": 128, "num_warps": 8}
# The gradient of hidden: 32 float32 values a thread.
OUTER: Config = {"BS": 16, "BD": 256, "num_warps": 4}


def rows_config(heads: int, width: int, dtype: torch.dtype, vectors: bool, direction: bool, arch: str) -> Config | None:
    """For programs that take whole rows and hold all queries of a sequence; None where these do not fit.

    vectors: sums of rows are kept, not only scalars. direction: products with a direction are formed beside scores.
    """
    if heads > MAX_QUERIES or width > WIDEST_ROW:
        return None
    chunk = CHUNK * _power_of_two(heads)
    if arch == "interpreter":  # takes time by operations: large tiles, and two pieces, which show how they join
        return _config(arch, 1, BS=4 * ROWS, BD=max(64, _power_of_two(width) // 2), CHUNK=chunk)
    lanes = 64 if arch.startswith("gfx") else 32
    held = heads * (1 + direction) * (1 + vectors)  # queries, directions and sums, for every column
    row_bytes = width * dtype.itemsize
    most = min(_at_most(ROWS // heads), _at_most(MOST_TILE // row_bytes))
    for warps, values in VALUES.items():
        threads = warps * lanes
        # Weights of several queries are intermediates at the same time. AMD's compiler keeps tiles in registers, too.
        values = (values // heads if lanes == 64 else values) - 16 * (heads - 1)
        # A 128-bit load of every thread; narrower rows are one piece, of which one warp takes several rows at a time.
        piece = threads * 16 // dtype.itemsize
        if warps > 1 and piece >= 2 * width:
            return None
        piece = min(piece, max(64, _power_of_two(width)))
        columns = max(1, -(-width // piece) * piece // threads)
        rows = min(most, _at_most(values // columns - held))
        if not vectors:  # after its products no row is needed again
            rows = min(most, max(2, _at_most(SCALARS_TILE // row_bytes))) if values >= held * columns else 0
        if columns <= COLUMNS[warps] and rows >= 1 and (rows == most or rows * row_bytes >= LEAST_TILE):
            break
    else:
        return None
    if not vectors:
        chunk = max(32, min(CHUNK, _at_most(DOT_CHUNK_BYTES // row_bytes)))
    config = _config(arch, warps, BS=rows, BD=piece, CHUNK=chunk)
    if arch in ("sm_100", "sm_120"):  # whose assembler else spills a few bytes to fit another block
        config["maxnreg"] = min(65536 // threads, 255)
    return config


def scores_config(heads: int, dtype: torch.dtype, direction: bool, arch: str) -> Config:
    """For the scores of many queries, as a matrix product."""
    queries = _queries(heads)
    if dtype is not torch.bfloat16:  # on float32 units, not tensor cores: operands take twice the room
        return _config(arch, 4, BH=queries, BS=32, BD=32)
    if direction and queries > 16:  # too many sums for 64 rows in 128 threads
        narrow = arch.startswith("gfx")
        return _config(arch, 4 if narrow else 8, BH=queries, BS=32 if narrow else 64, BD=64)
    return _config(arch, 4, BH=queries, BS=64, BD=64)


def sums_config(heads: int, dtype: torch.dtype, direction: bool, arch: str) -> Config:
    """For the weighted sums of many queries, a slice of columns a program: wide, as each reads the scores again."""
    queries = _queries(heads)
    chunk = CHUNK * _power_of_two(heads)
    if dtype is not torch.bfloat16:
        return _config(arch, 8 if queries > 16 else 4, BH=queries, BS=32, BD=64, CHUNK=chunk)
    if direction or queries > 16:
        return _config(arch, 8, BH=queries, BS=32, BD=256, CHUNK=chunk)
    return _config(arch, 4, BH=queries, BS=32, BD=128, CHUNK=chunk)


def _queries(heads: int) -> int:
    """Queries of a program: 16 is the least that a matrix product takes, for more than 32 it would lack registers."""
    return min(max(16, _power_of_two(heads)), 32)


def _config(arch: str, warps: int, **sizes: int) -> Config:
    # gfx942 has 64 KB of shared memory, which two tiles and the sums across warps would exceed.
    return {**sizes, "STAGES": 2 if arch.startswith("gfx") else 3, "num_warps": warps}


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _at_most(n: int) -> int:
    """The greatest power of two that is not above n; 0 below 1."""
    return 1 << n.bit_length() >> 1 if n > 0 else 0
