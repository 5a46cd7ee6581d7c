"""Which sequences share a forward pass: those of like length, so that little of what it computes is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A pass ends where its padding would exceed this share of the budget: 128 tokens of 8192. A smaller share gives less
# padding and more passes, each of which reads all weights once more.
_PADDING = 1 / 64


@dataclass(frozen=True)
class Tokens:
    """A budget: so many tokens run at a time, padding included. One sequence runs whatever its length."""

    number: int


def longest_first(lengths: Sequence[int], group: int = 1) -> list[int]:
    """The order of sequences in which passes take them: groups of `group` together, by length, as inside of each."""
    groups = [sorted(range(i, i + group), key=lambda row: -lengths[row]) for i in range(0, len(lengths), group)]
    groups.sort(key=lambda rows: [-lengths[row] for row in rows])
    return [row for rows in groups for row in rows]


def cut(lengths: Sequence[int], size: int | Tokens, group: int = 1) -> list[list[list[int]]]:
    """The passes of each micro-batch, as positions in `lengths`, which are in the order of `longest_first`.

    group 1: a micro-batch is one pass, of at most `size`. Else it is as many whole groups as fit into `size`: one pass
    of so many sequences, or passes that together compute so many tokens.
    """
    if group == 1:
        return [[positions] for positions in passes(lengths, size)]

    def parts(positions: list[int]) -> list[list[int]]:
        return [[positions[i] for i in part] for part in passes([lengths[i] for i in positions], size)]

    def fits(positions: list[int]) -> bool:
        return len(positions) <= size if isinstance(size, int) else computed(lengths, parts(positions)) <= size.number

    found: list[list[int]] = [[]]
    for start in range(0, len(lengths), group):
        more = sorted([*found[-1], *range(start, start + group)], key=lambda i: -lengths[i])
        if found[-1] and not fits(more):
            found.append(list(range(start, start + group)))
        else:
            found[-1] = more
    return [parts(positions) for positions in found]


def passes(lengths: Sequence[int], size: int | Tokens) -> list[list[int]]:
    """Positions in `lengths`, longest first, cut into passes of so many sequences, or by a budget of tokens."""
    return list(_by_number(len(lengths), size) if isinstance(size, int) else _by_tokens(lengths, size.number))


def computed(lengths: Sequence[int], parts: Sequence[Sequence[int]]) -> int:
    """Tokens of these passes, padding included."""
    return sum(len(positions) * max(lengths[i] for i in positions) for positions in parts)


def _by_number(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    taken, padding = list[int](), 0
    for i, length in enumerate(lengths):
        longest = lengths[taken[0]] if taken else length
        padding += longest - length
        if taken and ((len(taken) + 1) * longest > budget or padding > budget * _PADDING):
            yield taken
            taken, padding = [], 0
        taken.append(i)
    if taken:
        yield taken
