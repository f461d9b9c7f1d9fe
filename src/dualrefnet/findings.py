"""What an examination of data says: one finding a question, each with a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["PASS", "WARN", "FAIL"]

MAX_EXAMPLES = 10


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: PASS; WARN: known and worth knowing; FAIL: mend it before training.
        check: short id, the same in every release.
        message: one sentence for people.
        examples: up to ten ids.
        count: how many rows, images or values the finding is about.
    """

    level: Level
    check: str
    message: str
    examples: tuple[str, ...] = ()
    count: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the finding as values that JSON knows."""
        return {**asdict(self), "examples": list(self.examples)}


def found_or_pass(level: Level, check: str, found: list[str], what: str, nothing: str) -> Finding:
    """Return a finding of `level` that says `what` of the ids `found`, or a PASS that says `nothing` if there are none."""
    if not found:
        return Finding("PASS", check, nothing)
    return Finding(level, check, f"{what}: {len(found):,}", tuple(found[:MAX_EXAMPLES]), len(found))
