"""Compiles Triton kernels as their launchers would, for GPUs that are not there, and reads the machine code.

Triton carries an assembler and a disassembler for every target, so registers, spills, shared memory and the width of
every load are known without a GPU.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

# The most that a block may ask for, in bytes (CUDA C++ programming guide, "Technical specifications per compute
# capability"; AMD: the LDS of a compute unit).
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
REGISTER_LIMIT = 255  # a thread's, on NVIDIA
# What a thread may load narrowly or synchronously in an iteration of a streaming loop: mask bits, offsets, scalars.
SMALL_BYTES = 32
RESERVED_SHARED = 1024  # a block's, for the system, from sm_90 on: listed as static, but not part of the limit


class Launch(NamedTuple):
    """What Triton would compile for one `kernel[grid](...)`, specialisation and options included."""

    target: GPUTarget
    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]  # by position: constexprs, and arguments that are None or 1
    attributes: dict[tuple[int, ...], Any]  # by position: divisibility
    options: Any

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def configuration(self) -> dict[str, Any]:
        """The values of the parameters that the kernel declares as constexpr."""
        return {p.name: self.constants[(p.num,)] for p in self.kernel.params if p.is_constexpr}

    @property
    def key(self) -> str:
        """Equal for launches that differ in nothing but the target."""
        options = ("num_warps", "num_ctas", "num_stages", "maxnreg", "waves_per_eu", "enable_fp_fusion")
        chosen = [getattr(self.options, name, None) for name in options]
        return repr((self.kernel.cache_key, self.signature, self.constants, self.attributes, chosen))


class Load(NamedTuple):
    """A load from global memory."""

    name: str
    bits: int
    in_loop: bool
    place: str  # in the source, file.py:line

    @property
    def asynchronous(self) -> bool:
        return self.name in ("LDGSTS", "UBLKCP", "UTMALDG", "cp.async")


class Facts(NamedTuple):
    registers: int
    shared: int  # bytes a block
    stack: int  # bytes a thread: stack frame and local memory, scratch on AMD
    spills: int  # SASS instructions that access local memory; registers spilled on AMD
    loads: list[Load]  # of the machine code
    placed: list[Load]  # the same with their places in the source: for NVIDIA of the PTX, which knows them exactly


class _Instruction(NamedTuple):
    load: tuple[str, int] | None  # name and bits, if it loads from global memory
    targets: list[str]  # the labels where control may go
    falls_through: bool = True
    place: str = ""


class _Driver:
    """As much of a Triton driver as specialisation and compilation ask for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # the key of Triton's caches: every target has its own

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def _pretend(target: GPUTarget) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter compiles nothing: run this without TRITON_INTERPRET=1")
    with mock.patch.object(driver, "_active", _Driver(target)):
        yield


def launches(target: GPUTarget, call: Callable[[], Any]) -> list[Launch]:
    """What the Triton kernels that `call` launches would be compiled to; nothing is compiled or launched.

    Tensors on the meta device stand for those of the GPU: their address 0 is aligned, as an allocator's are.
    """
    found: list[Launch] = []

    def record(
        kernel: JITFunction,
        key: Any,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        *_: Any,
    ) -> None:  # None makes JITFunction.run return before it launches
        found.append(Launch(target, kernel, signature, constants, attributes, options))

    with _pretend(target), mock.patch.object(JITFunction, "_do_compile", record):
        call()
    return found


def compile(launch: Launch) -> CompiledKernel:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    with _pretend(launch.target):
        return triton.compile(source, target=launch.target, options=launch.options.__dict__)


def inspect(compiled: CompiledKernel, *, disassemble: bool = True) -> Facts:
    """`disassemble`: for NVIDIA, at a third of a second, read loads and spills of the machine code, not of the PTX."""
    if compiled.metadata.target.backend == "cuda":
        return inspect_cuda(compiled, disassemble)
    return inspect_amd(compiled)


def inspect_cuda(compiled: CompiledKernel, disassemble: bool) -> Facts:
    placed = loads = _ptx_loads(compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    if disassemble:
        loads = _sass_loads(disassembled(compiled))
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    facts = Facts(
        registers=number["REG"],
        # Dynamic and static; what is reserved for the system is listed as static, and no part of the limit.
        shared=compiled.metadata.shared + max(number["SHARED"] - RESERVED_SHARED, 0),
        stack=number["STACK"] + number["LOCAL"],
        spills=sum(load.name in ("LDL", "STL") for load in loads),
        loads=[load for load in loads if load.name not in ("LDL", "STL")],
        placed=placed,
    )
    # The assembler keeps loads as they are. Should the two listings disagree, one of them was misread.
    sass, ptx = ({(load.asynchronous, load.bits) for load in listing} for listing in (facts.loads, facts.placed))
    assert sass == ptx, f"{compiled.name}: loads (asynchronous, bits) {sorted(sass)} in SASS, {sorted(ptx)} in PTX"
    return facts


def disassembled(compiled: CompiledKernel) -> str:
    """NVIDIA's machine code as a listing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        # -ndf: without an analysis of the data flow
        return _output(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)


def inspect_amd(compiled: CompiledKernel) -> Facts:
    text = compiled.asm["amdgcn"]
    number = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    loads = _gcn_loads(text[text.index(f"\n{compiled.name}:") : text.index("\n.Lfunc_end0")], _files(text))
    return Facts(
        registers=number["vgpr_count"],
        shared=max(compiled.metadata.shared, number["group_segment_fixed_size"]),
        stack=number["private_segment_fixed_size"],
        spills=number["vgpr_spill_count"],  # scalar registers spill into lanes of vector registers: no memory access
        loads=loads,
        placed=loads,
    )


def places(kernel: JITFunction, argument: str) -> frozenset[str]:
    """Where a kernel loads from a pointer argument, written `tl.load(argument ...`: {"file.py:line"}."""
    text = "".join(kernel.raw_src)
    starts = [found.start() for found in re.finditer(rf"\btl\.load\(\s*{argument}\b", text)]
    assert starts, f"{kernel.fn.__name__}: no tl.load({argument} ...), so that its loads cannot be told from others"
    lines = [kernel.starting_line_number + text.count("\n", 0, start) for start in starts]
    return frozenset(_place(kernel.fn.__code__.co_filename, str(line)) for line in lines)


def problems(facts: Facts, target: str, streams: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with the code. `streams`: the places that load rows of a multiple of 16 bytes in a loop."""
    found = []
    if facts.stack or facts.spills:
        found.append(f"{facts.stack} bytes of stack, {facts.spills} spills")
    if target != "gfx942" and facts.registers > REGISTER_LIMIT:
        found.append(f"{facts.registers} registers, more than {REGISTER_LIMIT}")
    if facts.shared > SHARED_LIMIT[target]:
        found.append(f"{facts.shared} bytes of shared memory, more than {SHARED_LIMIT[target]}")
    if streams:
        found += _streaming_problems(facts, streams, must_be_asynchronous=target != "gfx942")
    return found


def _streaming_problems(facts: Facts, streams: frozenset[str], must_be_asynchronous: bool) -> list[str]:
    """Rows come 128 bits at a time, on NVIDIA asynchronously, and what else is loaded with them is small."""
    found = []
    rows = [load for load in facts.placed if load.place in streams]
    if narrow := [load for load in rows if load.bits < 128]:
        found.append(f"narrow loads of rows: {show(narrow)}")
    if waiting := [load for load in rows if must_be_asynchronous and not load.asynchronous]:
        found.append(f"synchronous loads of rows: {show(waiting)}")
    if not any(load.in_loop for load in rows):
        found.append("no loop loads rows")
    in_loops = [load for load in facts.loads if load.in_loop]  # of the machine code, as the assembler left it
    if not any(load.bits >= 128 and load.asynchronous >= must_be_asynchronous for load in in_loops):
        found.append(f"loads in loops are none for rows: {show(in_loops)}")
    if must_be_asynchronous:
        waiting = [load for load in in_loops if not load.asynchronous]
        if any(load.bits > 32 for load in waiting) or sum(load.bits for load in waiting) > 8 * SMALL_BYTES:
            found.append(f"synchronous loads in a loop, not small: {show(waiting)}")
    return found


def show(loads: Iterable[Load]) -> str:
    """LDGSTS.128 x4, LDG.32"""
    counts = Counter((-load.bits, load.name) for load in loads)
    shown = [f"{name}.{-bits}" + (f" x{n}" if n > 1 else "") for (bits, name), n in sorted(counts.items())]
    return ", ".join(shown) or "none"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _place(file: str, line: str) -> str:
    return f"{Path(file).name}:{line}"


def _files(text: str) -> dict[str, str]:
    """File numbers of debug information -> names, from PTX or AMD's assembler text."""
    return dict(re.findall(r'^\s*\.file\s+(\d+) (?:"[^"]*" )?"([^"]*)"', text, re.MULTILINE))


def _sass_loads(listing: str) -> list[Load]:
    """Loads from global memory, and all accesses of local memory."""
    code: list[_Instruction] = []
    labels: dict[str, list[int]] = {}
    barriers: list[tuple[str, str]] = []  # a barrier register, and where the threads that wait for it go on
    for line in listing.splitlines():
        if found := re.match(r"(\.L_\w+):", line):
            labels[found[1]] = [len(code)]
        # The predicate, the instruction, its operands; after these, newer versions print notes on scheduling.
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;&?]*)", line):
            predicate, instruction, operands = found.groups()
            name, *modifiers = instruction.split(".")
            targets = re.findall(r"`\((\.L_\w+)\)", operands) if name == "BRA" else []
            falls_through = predicate is not None or name not in ("BRA", "EXIT", "RET") or "," in operands
            if name == "BSSY":
                barriers += [(operands.split(",")[0], re.findall(r"`\((\.L_\w+)\)", operands)[0])]
            elif name == "BSYNC":
                targets = [operands.strip()]
            load = None
            if name in ("LD", "LDG", "LDGSTS", "LDL", "STL"):
                bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
                load = name, next((bits[m] for m in modifiers if m in bits), 32)
            elif name in ("UBLKCP", "UTMALDG"):  # bulk copies
                load = name, 128
            code.append(_Instruction(load, targets, falls_through))
    for barrier, label in barriers:
        labels.setdefault(barrier, []).extend(labels[label])
    return _loads(code, labels)


def _ptx_loads(text: str) -> list[Load]:
    files = _files(text)
    code: list[_Instruction] = []
    labels: dict[str, list[int]] = {}
    place, inline = "", 0
    for line in text.splitlines():
        if found := re.match(r"(\$L\w+):", line):
            labels[found[1]] = [len(code)]
        elif "inline asm" in line:
            inline = int("begin" in line)
        elif found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            # Some versions count the lines of inline assembly as lines of the source: its first one is right.
            place = place if inline > 1 else _place(files[found[1]], found[2])
            inline *= 2
        elif found := re.match(r"\s*(@!?%\w+\s+)?([a-z][\w.:]*)\s*([^;]*);", line):
            predicate, instruction, operands = found.groups()
            targets = [operands.strip()] if instruction.startswith("bra") else []
            falls_through = predicate is not None or not instruction.startswith(("bra", "ret", "exit"))
            load = None
            if kind := re.match(r"ld\.global.*?(?:\.v(\d))?\.[a-z](\d+)$", instruction):
                load = "ld", int(kind[1] or 1) * int(kind[2])
            elif instruction.startswith("cp.async.bulk."):
                load = "cp.async", 128
            elif instruction.startswith(("cp.async.ca.", "cp.async.cg.")):
                load = "cp.async", 8 * int(operands.split(",")[2], 0)
            code.append(_Instruction(load, targets, falls_through, place))
    return _loads(code, labels)


def _gcn_loads(text: str, files: dict[str, str]) -> list[Load]:
    code: list[_Instruction] = []
    labels: dict[str, list[int]] = {}
    place = ""
    for line in text.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            labels[found[1]] = [len(code)]
        elif found := re.match(r"\s+\.loc\s+(\d+) (\d+)", line):
            place = _place(files[found[1]], found[2])
        elif found := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
            instruction, operands = found.groups()
            branch = instruction.startswith(("s_branch", "s_cbranch"))
            load = None
            # E.g. buffer_load_dwordx4, global_load_ushort, global_load_lds_dword.
            kind = r"(buffer|global|flat)_load_(?:lds_)?(?:([us]byte)|([us]?short)|dword(?:x(\d))?)"
            if width := re.match(kind, instruction):
                load = f"{width[1]}_load", 8 if width[2] else 16 if width[3] else 32 * int(width[4] or 1)
            falls_through = instruction not in ("s_branch", "s_endpgm")
            code.append(_Instruction(load, [operands.strip()] if branch else [], falls_through, place))
    return _loads(code, labels)


def _loads(code: list[_Instruction], labels: dict[str, list[int]]) -> list[Load]:
    successors = []
    for i, instruction in enumerate(code):
        following = [j for label in instruction.targets for j in labels[label]] + [i + 1] * instruction.falls_through
        successors.append([j for j in following if j < len(code)])
    in_loop = _in_loops(successors)
    return [Load(*x.load, i in in_loop, x.place) for i, x in enumerate(code) if x.load is not None]


def _in_loops(successors: list[list[int]]) -> set[int]:
    """The instructions from which control can come back to themselves."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)

    def reachable(edges: list[list[int]], start: int) -> set[int]:
        seen, stack = {start}, [start]
        while stack:
            new = set(edges[stack.pop()]) - seen
            seen |= new
            stack += new
        return seen

    # Every cycle has an edge that goes back in the listing, and what is reachable from its end and reaches its start
    # is on a cycle with it.
    backward = [(i, j) for i, following in enumerate(successors) for j in following if j <= i]
    return set().union(*(reachable(successors, j) & reachable(predecessors, i) for i, j in backward))
