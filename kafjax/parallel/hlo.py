"""Collectives of a compiled program, read from its HLO text: the actual traffic between devices,
with every turn of a loop counted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "bf16": 16,
    "f16": 16,
    "s16": 16,
    "u16": 16,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      shape, largest: shape and bytes of its largest output on one device.
      n_bytes: bytes of all its outputs on one device.
      times: number of runs.
      group: number of devices that take part."""

    kind: str
    shape: str
    largest: int
    n_bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all runs, if the group is a ring."""
        share = (self.group - 1) / self.group
        factor = {
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,
            "collective-permute": 1,
        }.get(self.kind, share)
        return self.times * self.n_bytes * factor


def collectives(text: str) -> list[Collective]:
    """Lists the collectives of `compiled.as_text()`, in its order. A loop whose length the compiler
    does not know counts once."""
    computations = _computations(text)
    times, started = _times(computations), _started(computations)
    return [
        found
        for name, lines in computations.items()
        if times[name]
        for line in lines
        if started.get(_channel(line), name) == name
        for found in _collectives(line, times[name])
    ]


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Sums collectives as `{kind: {count, bytes, sent}}`: runs, bytes of outputs, and bytes sent by
    each device."""
    table: dict[str, dict[str, float]] = {}
    for c in found:
        row = table.setdefault(c.kind, {"count": 0, "bytes": 0, "sent": 0.0})
        row["count"] += c.times
        row["bytes"] += c.times * c.n_bytes
        row["sent"] += c.sent
    return {kind: table[kind] for kind in KINDS if kind in table}


def _computations(text: str) -> dict[str, list[re.Match[str]]]:
    """Instructions by computation; the entry's name is ""."""
    found: dict[str, list[re.Match[str]]] = {}
    current: list[re.Match[str]] | None = None
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = found.setdefault("" if line.startswith("ENTRY") else start[1], [])
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)) is not None:
            current.append(instruction)
    return found


def _times(computations: dict[str, list[re.Match[str]]]) -> Counter[str]:
    """Counts the runs of each computation in one run of the entry."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for name, instructions in computations.items():
        for instruction in instructions:
            opcode, rest = instruction[3], instruction[4]
            if opcode.endswith(("-done", "-update")):
                continue  # names the computation that its start has begun
            trips = _trips(rest, computations) if opcode == "while" else 1
            branches = [
                b.strip().lstrip("%") for group in _BRANCHES.findall(rest) for b in group.split(",")
            ]
            for called in {*_CALLED.findall(rest), *branches}:
                callers.setdefault(called, []).append((name, trips))

    times: Counter[str] = Counter({"": 1})

    def count(name: str) -> int:
        if name not in times:
            times[name] = sum(trips * count(caller) for caller, trips in callers.get(name, ()))
        return times[name]

    for name in computations:
        count(name)
    return times


def _started(computations: dict[str, list[re.Match[str]]]) -> dict[str | None, str]:
    """Maps each asynchronous collective to the computation that starts it.

    XLA for TPUs writes such a collective out several times: in the fusion that starts it, in each
    one that runs meanwhile, and in the one that waits for it.
    """
    begins = (
        name
        for name, lines in computations.items()
        if any('"AsyncCollectiveStart"' in line[4] for line in lines)
    )
    return {
        channel: name
        for name in begins
        for line in computations[name]
        if (channel := _channel(line)) is not None
    }


def _channel(instruction: re.Match[str]) -> str | None:
    found = _CHANNEL.search(instruction[4])
    return found and found[1]


def _trips(rest: str, computations: dict[str, list[re.Match[str]]]) -> int:
    """Counts the turns of a loop: noted by the compiler, or read from a scan's condition, which
    compares a counter with a constant."""
    if noted := _TRIPS.search(rest):
        return int(noted[1])
    condition = _CONDITION.search(rest)
    instructions = {i[1]: i for i in computations.get(condition[1], ())} if condition else {}
    for instruction in instructions.values():
        if instruction[3] == "compare" and "direction=LT" in instruction[4]:
            limit = instructions.get(re.findall(r"%([\w.\-]+)", instruction[4])[1])
            if limit is not None and limit[3] == "constant":
                return int(limit[4].partition(")")[0])
    return 1


def _collectives(instruction: re.Match[str], times: int) -> Iterator[Collective]:
    kind = instruction[3].removesuffix("-start")
    if kind in KINDS:
        arrays = [
            (_n_bytes(dtype, dims), f"{dtype}[{dims}]")
            for dtype, dims in _ARRAY.findall(instruction[2])
            # the start of a permutation also gives two numbers by which its end knows it
            if kind != "collective-permute" or (dtype, dims) != ("u32", "")
        ]
        largest, shape = max(arrays, default=(0, ""))
        total, group = sum(n for n, _ in arrays), _group(instruction[4])
        if instruction[3].endswith("-start"):  # whose type also has what goes in
            came_out = {
                "all-gather": group / (group + 1),
                "reduce-scatter": 1 / (group + 1),
                "all-reduce": 1,
            }.get(kind, 0.5)
            total = round(total * came_out)
        if kind == "reduce-scatter":
            largest = min(largest, total)
        yield Collective(kind, shape, largest, total, group, times)


def _n_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype.startswith("f8") else _BITS.get(dtype, 32)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _group(rest: str) -> int:
    # 'axis_0'=4,'axis_1'=2, and those that take part
    if named := re.search(r"replica_groups=@?mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        # a part of an axis: 'axis_0':(2)4
        taking_part = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in taking_part)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 2  # a permutation: from one to another
