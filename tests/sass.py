"""Control flow of one kernel as nvdisasm prints it: what can run after an instruction, and which registers it names."""

from __future__ import annotations

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*(?:/\*.*)?$")
LABEL = re.compile(r"(\.L_x_\d+):")


class Kernel(NamedTuple):
    instructions: list[str]
    labels: dict[str, int]  # the instruction that follows

    def after(self, start: int) -> set[int]:
        """The instructions that can run once this one has."""
        found: set[int] = set()
        waiting = [start + 1]
        while waiting:
            at = waiting.pop()
            if at in found or at >= len(self.instructions):
                continue
            found.add(at)
            words = re.sub(r"\s+", " ", self.instructions[at])
            predicate, operation = re.fullmatch(r"(?:(@\S+) )?(\S+).*", words).groups()  # type: ignore[union-attr]
            if operation.startswith(("BRA", "BRX", "JMP", "CALL", "WARPSYNC")):
                waiting += [self.labels[label] for label in re.findall(r"\.L_x_\d+", words)]
            conditional = predicate or ".DIV" in operation or ".CONV" in operation or re.search(r"[ !]U?P\d\b", words)
            ends = operation.startswith(("EXIT", "RET")) or operation.startswith(("BRA", "BRX", "JMP"))
            if conditional or not ends:
                waiting.append(at + 1)
        return found

    def highest_register(self, instructions: set[int]) -> int:
        return max(int(n) for at in instructions for n in re.findall(r"\bR(\d+)\b", self.instructions[at]))


def parse(text: str) -> Kernel:
    """One ``.text`` section of ``nvdisasm -c``."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            instructions.append(match[1].strip())
    return Kernel(instructions, labels)
