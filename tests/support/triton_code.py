"""Readers of compiled Triton kernels: Triton's IR, PTX, LLVM IR, machine code and resources.

An address is traced back to a parameter of the kernel by names alone: a register depends on all operands of every
instruction that defines it. A loaded value ends a trace, because no kernel here computes an address from loaded data.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu_model.gpus import LIMITS

WIDE = 16  # bytes of a 128-bit access


class Access(NamedTuple):
    """One load or store of one thread: the numbers of the parameters that it may access, and its bytes.

    There are several parameters if the compiler has merged accesses of several branches. There are none in machine
    code, which does not show them.
    """

    parameters: frozenset[int]
    store: bool
    bytes: int


def wide_share(accesses: Iterable[Access]) -> float | None:
    """The bytes moved by accesses of at least 128 bits over all bytes; None if there is no access."""
    accesses = list(accesses)
    total = sum(a.bytes for a in accesses)
    return sum(a.bytes for a in accesses if a.bytes >= WIDE) / total if total else None


class _Trace:
    """The names from which each name is computed, and the number of the parameter that a name is."""

    def __init__(self) -> None:
        self.sources: dict[str, set[str]] = defaultdict(set)
        self.roots: dict[str, int] = {}

    def origins(self, name: str) -> set[int]:
        return {self.roots[n] for n in self.closure(name) if n in self.roots}

    def closure(self, name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            n = todo.pop()
            if n not in seen:
                seen.add(n)
                todo += self.sources[n]
        return seen


# ---- PTX -------------------------------------------------------------------------------------------------------------

_PTX_ACCESS = re.compile(r"(ld|st)(?:\.\w+)*?\.global(?:[.:]+\w+)*?(?:\.v(\d))?\.\w(\d+)\s")
_PTX_REGISTER = re.compile(r"%\w+")


def ptx_accesses(ptx: str) -> list[Access]:
    """The global loads and stores, with parameters numbered as in the list of the entry."""
    trace, pointers, pending = _Trace(), set(), []
    for number in re.findall(r"\.param \.u64 \.ptr \S+(?: \.align \d+)? \w+_param_(\d+)", ptx):
        pointers.add(int(number))
    for statement in re.sub(r"//.*|^\s*\.(?:loc|file)\b.*", "", ptx, flags=re.M).split(";"):
        text = re.sub(r"^(\s|\$\w+:|\{|\}|@!?%\w+)*", "", statement)
        opcode, _, operands = text.partition(" ") if "\t" not in text else text.partition("\t")
        parameter = re.match(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", text)
        if parameter:
            trace.roots[parameter[1]] = int(parameter[2])
            continue
        access = _PTX_ACCESS.match(text)
        if access:
            address = re.search(r"\[\s*(%\w+)", text)
            assert address is not None, text
            pending.append((address[1], access[1] == "st", int(access[2] or 1) * int(access[3]) // 8))
            continue
        copy = re.match(r"cp\.async\S*\.global\S*\s+\[[^\]]*\],\s*\[\s*(%\w+)[^\]]*\],\s*(\w+)", text)
        if copy:
            pending.append((copy[1], False, int(copy[2], 0)))
            continue
        if opcode.startswith(("ld.", "atom.", "red.", "st.")):
            continue
        head = re.match(r"\s*(\{[^}]*\}|%\w+(?:\|%\w+)?)\s*,?(.*)", operands, re.S)
        if head:
            for name in _PTX_REGISTER.findall(head[1]):
                trace.sources[name].update(_PTX_REGISTER.findall(head[2]))
    return [Access(frozenset(trace.origins(address) & pointers), store, size) for address, store, size in pending]


#: The opcodes that a kernel may contain, so that simple tools can execute its PTX: arithmetic, comparisons,
#: conversions, accesses, barriers and exchanges within a warp. Triton emits ldmatrix, and from sm_90 on stmatrix, where
#: a tile changes its layout in shared memory, and createpolicy for loads that the caches should give up first.
PLAIN_PTX = re.compile(
    r"(abs|add|and|bfe|cvt|div|fma|mad|max|min|mov|mul|neg|not|or|prmt|rem|selp|setp|shf|shl|shr|sqrt|sub|xor)\.[.\w]+"
    r"|bra(\.uni)?|ret|ex2\.approx(\.ftz)?\.f32|(ld|st)\.(global|shared(::cta)?|param)(\.v[24])?\.b\d+"
    r"|ld\.global\.L1::evict_first\.L2::cache_hint(\.v[24])?\.b\d+|createpolicy\.fractional\.L2::evict_first\.b64"
    r"|bar(\.warp)?\.sync|shfl\.sync\.(bfly|idx)\.b32|(ld|st)matrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16"
)


def ptx_opcodes(ptx: str) -> set[str]:
    """All opcodes of a kernel with their suffixes."""
    found = set()
    for statement in re.sub(r"//.*|^\s*\.(?:loc|file)\b.*", "", ptx, flags=re.M).split(";"):
        text = re.sub(r"^(\s|\$\w+:|\{|\}|@!?%\w+)*", "", statement)
        opcode = re.match(r"[a-z][\w.:]*", text)
        if opcode:
            found.add(opcode[0])
    return found


# ---- LLVM IR, the input of AMD's backend -----------------------------------------------------------------------------

_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def _llvm_bytes(kind: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    if vector:
        return int(vector[1]) * _llvm_bytes(vector[2])
    return (_LLVM_BITS.get(kind) or int(kind.removeprefix("i"))) // 8


_TYPE, _NAME = r"(<\d+ x \w+>|\w+)", r"(%[-\w.$]+)"
_LLVM_LOAD = re.compile(
    rf"(?:tail )?(?:load (?:volatile )?{_TYPE}, ptr addrspace\(1\) {_NAME}"
    rf"|call {_TYPE} @llvm\.(?:masked\.load|amdgcn\.raw\.ptr\.buffer\.load)\S*\(ptr addrspace\([18]\)[^%]*{_NAME})"
)
_LLVM_STORE = re.compile(
    rf"(?:tail )?(?:store {_TYPE} [^,]+(?:<[^>]*>)?, ptr addrspace\(1\) {_NAME}"
    rf"|call void @llvm\.(?:masked\.store|amdgcn\.raw\.ptr\.buffer\.store)\S*"
    rf"\({_TYPE} .*?, ptr addrspace\([18]\)[^%]*{_NAME})"
)


def llvm_accesses(llir: str) -> list[Access]:
    """The global loads and stores of a kernel in LLVM IR, with parameters numbered as in its definition."""
    header = re.search(r"^define [^\n]*amdgpu_kernel [^\n]*@\w+\(([^\n]*)\) ", llir, re.M)
    assert header is not None
    trace, pointers, pending = _Trace(), set(), []
    for i, argument in enumerate(re.findall(r"[^,(]*(?:\([^)]*\)[^,(]*)*", header[1])[::2]):
        trace.roots["%" + argument.split("%")[-1].strip()] = i
        if "ptr addrspace(1)" in argument:
            pointers.add(i)
    for line in llir[header.end() :].splitlines():
        if line.startswith("}"):
            break
        name, _, right = line.strip().rpartition(" = ")
        name = name.strip()
        right = right.split(", !dbg")[0]
        load, store = _LLVM_LOAD.match(right), _LLVM_STORE.match(right)
        found = load or store
        if found:
            kind, address = (found[1], found[2]) if found[1] else (found[3], found[4])
            pending.append((address, store is not None, _llvm_bytes(kind)))
        elif name.startswith("%"):
            trace.sources[name].update(re.findall(r"%[-\w.$]+", right))
    return [Access(frozenset(trace.origins(address) & pointers), store, size) for address, store, size in pending]


# ---- machine code ----------------------------------------------------------------------------------------------------


def sass_accesses(sass: str) -> list[Access]:
    """The global loads and stores in the listing of ``nvdisasm``, which does not show their parameters."""
    out = []
    for kind, suffix in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)*)\b", sass):
        size = 4
        for part in suffix.split("."):
            size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}.get(part, size)
        out.append(Access(frozenset(), kind == "STG", size))
    return out


def sass_spills(sass: str) -> int:
    """The number of loads and stores of local memory, which holds spilled registers."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


_AMD_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "short": 2,
    "ushort": 2,
    "sshort": 2,
} | dict.fromkeys(("byte", "ubyte", "sbyte"), 1)


def amd_accesses(assembly: str) -> list[Access]:
    """The global loads and stores in AMD's assembly."""
    found = re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_(dwordx\d|[a-z]+)", assembly, re.M)
    return [Access(frozenset(), kind == "store", _AMD_BYTES[width]) for kind, width in found]


# ---- resources -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """A thread's registers (vector registers on AMD) and spilled accesses, and a program's bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def nvidia_resources(usage: str, sass: str, shared: int) -> Resources:
    """From ``cuobjdump --dump-resource-usage`` and ``nvdisasm``; ``shared`` is the shared memory of the launch."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Resources(int(found[1]), sass_spills(sass) + (int(found[2]) > 0), shared)


def amd_resources(assembly: str, shared: int) -> Resources:
    """The resources in the metadata at the end of AMD's assembly."""
    found = re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly, re.M)
    fields = {name: int(value) for name, value in found}
    # The spills of scalar registers are not counted: a lane of a vector register holds them, and no memory.
    spills = fields["vgpr_spill_count"] + (fields["private_segment_fixed_size"] > 0)
    return Resources(fields["vgpr_count"], spills, shared)


def occupancy(target: str, resources: Resources, warps: int) -> float:
    """Resident warps over the most that a multiprocessor (AMD: a compute unit) holds."""
    limits = LIMITS[target]
    return limits.resident(resources.registers, resources.shared, warps) * warps / limits.warps


# ---- Triton's IR -----------------------------------------------------------------------------------------------------


class _Scopes:
    """The values of a textual IR. A name in another region may be another value."""

    def __init__(self) -> None:
        self.stack: list[dict[str, str]] = [{}]
        self.count = 0

    def new(self, name: str) -> str:
        self.count += 1
        self.stack[-1][name] = f"{name} {self.count}"
        return self.stack[-1][name]

    def __getitem__(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.stack) if name in scope), name)


class _Region(NamedTuple):
    """An operation with regions: its results and the arguments of its loop. Both receive the yielded values."""

    results: list[str]
    arguments: list[str]


def narrow_offsets(ttir: str, maps: Iterable[str]) -> list[str]:
    """Each addition of an offset of fewer than 64 bits to a pointer into one of the parameters ``maps``.

    A place within a tile may have 32 bits: an offset that depends on no size, program number or loop index.
    """
    trace, scopes, open_regions, added = _Trace(), _Scopes(), [], []
    sizes: set[str] = set()
    wanted = set(maps)
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*", "", line.strip())
        if "tt.func" in text:
            scopes.stack.append({})  # the compiler may leave behind functions that it has inlined
            # The location of a parameter stands between it and the next parameter.
            for name, kind in re.findall(r"%(\w+): (\S+)", line.split(") attributes")[0]):
                if kind.startswith("!tt.ptr"):
                    trace.roots[scopes.new(f"%{name}")] = int(name in wanted)
                else:
                    sizes.add(scopes.new(f"%{name}"))
            continue
        if text.startswith("}"):
            scopes.stack.pop()
            if text.endswith("{"):  # else, or the second region of a while loop
                scopes.stack.append({})
            elif open_regions:
                open_regions.pop()
            continue
        if re.match(r"scf\.(yield|condition)", text):
            values = [scopes[v] for v in _VALUE.findall(text)]
            for targets in open_regions[-1]:
                for target, value in zip(targets, values, strict=False):
                    trace.sources[target].add(value)
            continue
        assigned = re.match(r"(%\w+(?::\d+)?(?:, %\w+)*) = ", text)
        left, right = (assigned[1], text[assigned.end() :]) if assigned else ("", text)
        operands = [scopes[v] for v in _VALUE.findall(right.split(" : ")[0])]
        carried = [(name, scopes[start]) for name, start in re.findall(r"(%\w+) = (%[\w#]+)", right)]
        results = [scopes.new(name) for name in _results(left)]
        if text.endswith("{"):
            scopes.stack.append({})
            arguments = [scopes.new(name) for name, _ in carried]
            for argument, (_, start) in zip(arguments, carried, strict=True):
                trace.sources[argument].add(start)
            if right.startswith("scf.for"):  # The first argument of a for loop is its index, which is not yielded.
                sizes.add(arguments.pop(0))
            open_regions.append(_Region(results, arguments))
        elif right.startswith("tt.addptr"):
            trace.sources[results[0]].add(operands[0])  # the pointer alone, without the offset
            added.append((*operands, right))
        elif not right.startswith("tt.load"):
            for result in results:
                trace.sources[result].update(operands)
            if right.startswith("tt.get_program_id"):
                sizes.update(results)
    return [
        text
        for pointer, offset, text in added
        if 1 in trace.origins(pointer) and not re.search(r"(?:, |x)i64(?:>|$)", text) and trace.closure(offset) & sizes
    ]


_VALUE = re.compile(r"%[\w#]+")


def _results(left: str) -> list[str]:
    many = re.fullmatch(r"(%\w+):(\d+)", left)
    return [f"{many[1]}#{i}" for i in range(int(many[2]))] if many else re.findall(r"%\w+", left)
