"""Reading what runs on a GPU: where the addresses of tensor cores' operands come from.

ptxas 12.8 was seen to take such an address from a uniform register that held a pointer on one of the ways there, and a
product read beyond shared memory. An address is made of shared memory's base, of constants and of counters of turns;
never of a kernel's parameters, which ULDC loads, nor of products of such, which UIMAD makes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FOREIGN = ("ULDC", "UIMAD")


class Line(NamedTuple):
    """An instruction: its place, whether it has a predicate, its name, and its operands."""

    place: str
    guarded: bool
    name: str
    operands: str

    @property
    def made(self) -> list[int]:
        """The uniform registers that it writes."""
        if not self.name.startswith(("U", "S2UR", "R2UR")):
            return []
        first = [int(n) for n in re.findall(r"\bUR(\d+)\b", self.operands.split(",")[0])]
        return [first[0], first[0] + 1] if first and (".64" in self.name or ".WIDE" in self.name) else first

    @property
    def used(self) -> list[int]:
        """The uniform registers that it reads."""
        found = [int(n) for n in re.findall(r"\bUR(\d+)\b", ",".join(self.operands.split(",")[1:]))]
        return [n + k for n in found for k in range(2)] if self.name.startswith("UIADD3.64") else found

    @property
    def address(self) -> list[int]:
        """The uniform registers with the addresses of a product of tensor cores."""
        found = re.search(r"gdesc\[UR(\d+)\]", self.operands) if self.name.startswith("HGMMA") else None
        if not found:
            return []
        first = int(found[1])
        in_registers = re.search(r"\bR\d+, R\d+, gdesc", self.operands)  # the left operand
        return [first + n for n in range(2 if in_registers else 0, 4)]


def foreign_addresses(listing: str) -> list[str]:
    """Products of tensor cores with an address that a parameter of the kernel reaches, on any way through it.

    Args:
        listing: what `nvdisasm -c` says of a kernel.
    """
    lines: list[Line] = []
    labels: dict[str, int] = {}
    for text in listing.splitlines():
        if label := re.match(r"\.(L_x_\d+):", text.strip()):
            labels[label[1]] = len(lines)
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Za-z0-9_.]+)\s*(.*?)\s*;", text):
            lines.append(Line(found[1], bool(found[2]), found[3], found[4]))
    before: list[list[int]] = [[] for _ in lines]
    for n, line in enumerate(lines):
        target = re.search(r"L_x_\d+", line.operands) if line.name.startswith("BRA") else None
        after = [labels[target[0]]] if target and target[0] in labels else []
        if line.guarded or not line.name.startswith(("BRA", "EXIT")):
            after.append(n + 1)
        for other in after:
            if other < len(lines):
                before[other].append(n)

    def made_by(n: int, register: int) -> set[int]:
        found, seen, todo = set(), set(), list(before[n])
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            if register in lines[at].made:
                found.add(at)
                if not lines[at].guarded:
                    continue
            todo += before[at]
        return found

    wrong = []
    for n, line in enumerate(lines):
        todo, seen = [(n, register) for register in line.address], set()
        while todo:
            at, register = todo.pop()
            if (at, register) in seen:
                continue
            seen.add((at, register))
            for maker in made_by(at, register):
                if lines[maker].name.startswith(FOREIGN):
                    wrong.append(f"{line.place}: UR{register} of {lines[maker].name} {lines[maker].operands}")
                else:
                    todo += [(maker, other) for other in lines[maker].used]
    return wrong
