"""What `accelerate` says of a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A module that runs on the kernels: its name in the model ("" is the model), its family, and "PPM" or "head"."""

    name: str
    family: str
    part: str


@dataclass(frozen=True)
class Refusal:
    """A module that is left as it is, and why."""

    name: str
    family: str
    reason: str


@dataclass
class Report:
    """What `accelerate` found.

    Attributes:
        accelerated: what runs on the kernels from now on.
        already: what did before.
        refused: what is nearly a known family, with the reason why it is left alone.
        near: names of other modules that pool adaptively, or are called like a pyramid, where no pyramid was found.
    """

    accelerated: list[Part] = field(default_factory=list)
    already: list[Part] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    near: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, parts in (("accelerated", self.accelerated), ("already accelerated", self.already)):
            lines += [f"{title}: {part.name or 'the model'} ({part.family}, {part.part})" for part in parts]
        lines += [f"left as it is: {each.name or 'the model'} ({each.family}): {each.reason}" for each in self.refused]
        if not self.accelerated and not self.already:
            lines.append("no pyramid pooling module was accelerated, the model is unchanged")
            if self.near:
                lines.append(f"near misses: {', '.join(self.near)}")
        return "\n".join(lines)
