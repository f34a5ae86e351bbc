"""PTX, decoded for the executor.

:class:`Kernel` reads one ``.entry`` of a module: its parameters, its memory, and its instructions, whose operands are
numbers of registers. Constants and special registers are registers too, which the executor fills before a block begins.
A form that is not decoded raises :class:`Unknown`, so that nothing is executed as something else.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


def words(*lines: str) -> list[str]:
    return " ".join(lines).split()


# The lists of program.h, in its order.
TYPES = words("u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f32 f64 pred f16x2 bf16x2")
BITS = dict(zip(TYPES, (8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 1, 32, 32), strict=True))
OPERATIONS = words(
    "add sub mul mad fma div rem neg abs min max and or xor not shl shr bfe bfi prmt lop3 shf clz popc copysign selp",
    "setp ex2 rcp rsqrt sqrt mov pack unpack cvt cvt_pack cvta cvta_to ld st ldmatrix stmatrix shfl bar bar_warp bra",
    "ret trap fence",
)
FLAGS = words("ftz sat nan wide hi rz rm rp rni rzi rmi rpi relu trans negated left clamp")
SPACES = words("global shared local param generic")
COMPARISONS = words("eq ne lt le gt ge equ neu ltu leu gtu geu num nan")
SHUFFLES = words("idx up down bfly")
COMBINATIONS = words("none and or xor")
SPECIALS = words(
    "tid_x tid_y tid_z ctaid_x ctaid_y ctaid_z ntid_x ntid_y ntid_z nctaid_x nctaid_y nctaid_z laneid",
    "dynamic_smem_size",
)

#: Types without a meaning of their own, and other names of comparisons and flags.
UNTYPED = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}
SYNONYMS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
#: Number of sources of the operations that need no more than their operands in order.
PLAIN = {
    **dict.fromkeys(words("neg abs not clz popc ex2 rcp rsqrt sqrt"), 1),
    **dict.fromkeys(words("add sub mul div rem min max and or xor shl shr copysign"), 2),
    **dict.fromkeys(words("mad fma bfe"), 3),
    "bfi": 4,
}


class Unknown(Exception):
    """An instruction or an operand that is not decoded."""


@dataclass
class Instruction:
    """Fields as in program.h, with names in place of numbers."""

    op: str
    line: int
    type: str = "u32"
    other: int = 0
    flags: list[str] = field(default_factory=list)
    predicate: int = -1
    negated: bool = False
    results: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    target: int = 0
    space: str = "generic"
    width: int = 0
    count: int = 1
    combine: str = "none"
    immediate: int = 0


@dataclass
class Parameter:
    name: str
    offset: int
    bytes: int


def split(text: str) -> list[str]:
    """The operands between commas that no bracket encloses."""
    out, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            out.append(part.strip())
            part = ""
        else:
            part += letter
    return [*out, part.strip()] if part.strip() else out


def aligned(offset: int, bytes: int) -> int:
    return -(-offset // bytes) * bytes


def bytes_of(type: str) -> int:
    return BITS[UNTYPED.get(type, type)] // 8


class Kernel:
    """One entry of a module."""

    def __init__(self, text: str, name: str) -> None:
        self.name, self.text = name, text
        self.slots: dict[str, int] = {}
        self.bits: list[int] = []  # of each register
        self.constants: dict[int, int] = {}  # value -> register
        self.specials: dict[str, int] = {}  # name -> register
        self.code: list[Instruction] = []
        clean = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        clean = re.sub(r"//[^\n]*", "", clean)
        head = re.search(rf"\.entry\s+{re.escape(name)}\s*(?:\((.*?)\))?([^{{;]*)\{{", clean, re.S)
        if head is None:
            raise Unknown(f"the module has no entry {name}")
        self.parameters = _parameters(head[1] or "")
        self.parameter_bytes = self.parameters[-1].offset + self.parameters[-1].bytes if self.parameters else 0
        most = re.search(r"\.(?:max|req)ntid\s+(\d+)", head[2])
        self.most_threads = int(most[1]) if most else 1024
        body = clean[head.end() : _end_of_body(clean, head.end())]
        first_line = clean.count("\n", 0, head.end()) + 1
        self.symbols = {p.name: p.offset for p in self.parameters}
        outside = re.sub(r"\.entry.*?\{.*?\n\}", "", clean[: head.start()], flags=re.S)
        self.static_shared, self.local = self._variables(outside + body)
        for type, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
            for register in split(names):
                self._declare(register, BITS[UNTYPED.get(type, type)])
        self._statements(body, first_line)

    def source(self, line: int) -> str:
        """A line of the module's text."""
        rows = self.text.split("\n")
        return rows[line - 1].strip() if 0 < line <= len(rows) else "?"

    # ---- declarations

    def _variables(self, text: str) -> tuple[int, int]:
        """Places of the variables in shared and in local memory; what dynamic ones name begins where the others end."""
        sizes, dynamic = {"shared": 0, "local": 0}, []
        pattern = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?"
        for space, alignment, type, name, length in re.findall(pattern, text):
            if length == "[]":
                dynamic.append(name)
                continue
            self.symbols[name] = aligned(sizes[space], int(alignment or bytes_of(type)))
            sizes[space] = self.symbols[name] + bytes_of(type) * int(length[1:-1] if length else 1)
        shared, local = (aligned(size, 16) for size in sizes.values())
        self.symbols |= dict.fromkeys(dynamic, shared)
        return shared, local

    def _declare(self, register: str, bits: int) -> None:
        many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", register)
        for name in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [register]:
            # A name that an inner scope declares again is one register for all scopes.
            slot = self.slots.setdefault(name, len(self.bits))
            if slot == len(self.bits):
                self.bits.append(bits)
            elif self.bits[slot] != bits:
                raise Unknown(f"{self.name}: {name} is declared twice")

    def _statements(self, body: str, first_line: int) -> None:
        labels: dict[str, int] = {}
        branches: list[tuple[Instruction, str]] = []
        for statement, line in _statements(body, first_line):
            label = re.fullmatch(r"([$\w]+):", statement)
            if label:
                labels[label[1]] = len(self.code)
                continue
            guard = re.match(r"@(!?)(%\w+)\s+", statement)
            text = statement[guard.end() :] if guard else statement
            name, _, operands = text.partition(" ")
            try:
                i = self._instruction(name, split(operands), line)
            except (KeyError, IndexError, StopIteration, ValueError) as error:
                raise Unknown(f"{self.name}, line {line}: {statement}") from error
            if guard:
                i.predicate, i.negated = self.slots[guard[2]], guard[1] == "!"
            if i.op == "bra":
                branches.append((i, operands.strip()))
            self.code.append(i)
        for i, name in branches:
            i.target = labels[name]

    # ---- operands

    def _constant(self, bits: int) -> int:
        bits &= 2**64 - 1
        if bits not in self.constants:
            self.constants[bits] = len(self.bits)
            self.bits.append(64)
        return self.constants[bits]

    def _operand(self, text: str, type: str = "b32") -> int:
        if text == "_":
            return -1
        if text in self.slots:
            return self.slots[text]
        special = text.removeprefix("%").replace(".", "_")
        if text.startswith("%") and special in SPECIALS:
            if special not in self.specials:
                self.specials[special] = len(self.bits)
                self.bits.append(32)
            return self.specials[special]
        if text in self.symbols:
            return self._constant(self.symbols[text])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return self._constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) and type not in ("f32", "f64"):
            return self._constant(int(text.rstrip("U"), 0))
        if type in ("f32", "f64"):
            return self._constant(int.from_bytes(struct.pack("<f" if type == "f32" else "<d", float(text)), "little"))
        raise ValueError(text)

    def _address(self, text: str, i: Instruction) -> int:
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise ValueError(text)
        i.immediate = int(found[2] or "0", 0)
        return self._operand(found[1], "b64")

    def _list(self, text: str, type: str = "b32") -> list[int]:
        """The registers between braces, or one."""
        return [self._operand(part, type) for part in (split(text[1:-1]) if text[0] == "{" else [text])]

    def _pair(self, text: str) -> list[int]:
        """A result and a predicate, or a result."""
        return [self._operand(part) for part in text.split("|")]

    def _predicate(self, text: str, i: Instruction) -> int:
        if text.startswith("!"):
            i.flags.append("negated")
        return self._operand(text.removeprefix("!"))

    # ---- instructions

    def _instruction(self, name: str, a: list[str], line: int) -> Instruction:
        first, *parts = name.replace("::", "_").split(".")
        last = parts[-1] if parts else ""
        i = Instruction(first, line, UNTYPED.get(last, last) if last else "u32")
        i.flags = [flag for flag in (part.lower() for part in parts) if flag in FLAGS]
        if first in ("membar", "fence", "griddepcontrol"):
            return Instruction("fence", line)
        if first in ("ret", "exit", "trap", "bra"):
            return Instruction("ret" if first == "exit" else first, line)
        decode = getattr(self, f"_{first}", None) or (self._plain if first in PLAIN else None)
        if decode is None:
            raise ValueError(name)
        decode(i, parts, a)
        if i.type not in TYPES:
            raise ValueError(name)
        return i

    def _plain(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        if "cc" in parts or len(a) != 1 + PLAIN[i.op]:
            raise ValueError(i.op)
        i.results, i.sources = [self._operand(a[0])], [self._operand(x, parts[-1]) for x in a[1:]]

    def _bar(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.type = "u32"
        if parts[:2] == ["warp", "sync"]:
            i.op, i.sources = "bar_warp", [self._operand(a[0])]
        elif "sync" in parts and not {"red", "cluster"} & set(parts) and len(a) == 1:
            i.op, i.immediate = "bar", int(a[0], 0)
        else:
            raise ValueError(a)

    _barrier = _bar

    def _ld(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        self._memory(i, parts)
        i.results, i.sources = self._list(a[0]), [self._address(a[1], i)]
        if len(i.results) != i.count:
            raise ValueError(a)

    def _st(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        self._memory(i, parts)
        i.sources = [self._address(a[0], i), *self._list(a[1], parts[-1])]
        if len(i.sources) != 1 + i.count:
            raise ValueError(a)

    def _memory(self, i: Instruction, parts: list[str]) -> None:
        spaces = [part.removesuffix("_cta") for part in parts]
        i.space = next((space for space in spaces if space in SPACES), "generic")
        i.count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
        i.width = bytes_of(parts[-1])

    def _ldmatrix(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        self._matrices(i, parts)
        i.results, i.sources = self._list(a[0]), [self._address(a[1], i)]

    def _stmatrix(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        self._matrices(i, parts)
        i.sources = [self._address(a[0], i), *self._list(a[1])]

    def _matrices(self, i: Instruction, parts: list[str]) -> None:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise ValueError(parts)
        i.count = next(int(part[1:]) for part in parts if part in ("x1", "x2", "x4"))
        i.space, i.width = "shared", 4

    def _shfl(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        if parts[0] != "sync":
            raise ValueError(parts)
        i.other = SHUFFLES.index(parts[1])
        i.results, i.sources = self._pair(a[0]), [self._operand(x) for x in a[1:5]]
        if len(i.sources) != 4:
            raise ValueError(a)

    def _mov(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.results, i.sources = self._list(a[0]), self._list(a[1], parts[-1])
        if a[0][0] == "{" or a[1][0] == "{":
            i.op = "unpack" if a[0][0] == "{" else "pack"
            i.width = BITS[i.type] // max(len(i.results), len(i.sources))

    def _createpolicy(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        # A policy is a hint for the cache, which the executor does not have. Loads name it as a last operand.
        i.op, i.results, i.sources = "mov", [self._operand(a[0])], [self._constant(0)]

    def _cvta(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.op = "cvta_to" if "to" in parts else "cvta"
        i.space = next((part for part in parts if part in SPACES), "generic")
        i.results, i.sources = [self._operand(a[0])], [self._operand(a[1], "b64")]

    def _cvt(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        to, source = parts[-2:]
        if {"rna", "satfinite"} & set(parts) or (to not in ("f32", "f64") and {"rz", "rm", "rp"} & set(parts)):
            raise ValueError(parts)
        i.type, i.other = to, TYPES.index(UNTYPED.get(source, source))
        i.results, i.sources = [self._operand(a[0])], [self._operand(x, source) for x in a[1:]]
        if to in ("f16x2", "bf16x2"):
            i.op = "cvt_pack"
            if source != "f32" or len(a) != 3:
                raise ValueError(parts)
        elif len(a) != 2:
            raise ValueError(a)

    def _setp(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        comparison = parts[0]
        i.other = COMPARISONS.index(SYNONYMS.get(comparison, comparison))
        i.results, i.sources = self._pair(a[0]), [self._operand(x, parts[-1]) for x in a[1:3]]
        i.flags = [flag for flag in i.flags if flag == "ftz"]
        if parts[1] in COMBINATIONS:
            i.combine = parts[1]
            i.sources.append(self._predicate(a[3], i))

    def _selp(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.results = [self._operand(a[0])]
        i.sources = [*(self._operand(x, parts[-1]) for x in a[1:3]), self._predicate(a[3], i)]

    def _lop3(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.results, i.sources, i.immediate = [self._operand(a[0])], [self._operand(x) for x in a[1:4]], int(a[4], 0)

    def _shf(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        i.flags = [name for name, there in (("left", parts[0] == "l"), ("clamp", "clamp" in parts)) if there]
        i.results, i.sources = [self._operand(a[0])], [self._operand(x) for x in a[1:4]]

    def _prmt(self, i: Instruction, parts: list[str], a: list[str]) -> None:
        if len(parts) > 1:
            raise ValueError(parts)
        i.results, i.sources = [self._operand(a[0])], [self._operand(x) for x in a[1:4]]


def _parameters(text: str) -> list[Parameter]:
    out: list[Parameter] = []
    end = 0
    for declaration in split(text):
        words = declaration.split()
        type = next(word[1:] for word in words if word[1:] in TYPES or word[1:] in UNTYPED)
        name, _, length = words[-1].rstrip("]").partition("[")
        # The alignment of what a pointer leads to is no alignment of the pointer.
        own = ".align" in words and ".ptr" not in words
        offset = aligned(end, int(words[words.index(".align") + 1]) if own else bytes_of(type))
        out.append(Parameter(name, offset, bytes_of(type) * int(length or 1)))
        end = out[-1].offset + out[-1].bytes
    return out


def _end_of_body(text: str, begin: int) -> int:
    depth = 1
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise Unknown("an entry without an end")


def _statements(body: str, line: int) -> Iterator[tuple[str, int]]:
    """Each label and each instruction, without directives, and its line."""
    for part in body.split(";"):
        text, here = part, line
        line += part.count("\n")
        while True:
            # A brace opens a scope of names and does nothing else.
            bare = text.lstrip(" \t\n{}")
            here += text[: len(text) - len(bare)].count("\n")
            text = bare
            skipped = re.match(r"\.(?:loc|file|section)\b[^\n]*\n?", text)
            label = re.match(r"([$\w]+):(?!:)", text)
            if label:
                yield label[0], here
            if not (skipped or label):
                break
            end = (skipped or label).end()  # type: ignore[union-attr]
            here += text[:end].count("\n")
            text = text[end:]
        text = re.sub(r"\s+", " ", text).strip()
        if text and not text.startswith("."):
            yield text, here
