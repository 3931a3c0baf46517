"""What is found: one fault of one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAULT, WARNING = "fault", "warning"


@dataclass(frozen=True)
class Finding:
    """A fault, with the numbers of the configuration that has it.

    Attributes:
        check: the name of the check.
        severity: ``fault``: wrong numbers, NaN, an exception, or a loss that shows; ``warning``: what costs less, or
            depends on what is not written down.
        problem: what is wrong, in one sentence.
        cost: the figure it costs.
        set: keys of the configuration with the values that mend it.
        remove: keys to take out.
        note: what else mends it, or what to know.
    """

    check: str
    severity: str
    problem: str
    cost: str
    set: Mapping[str, Any] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    note: str = ""

    @property
    def fix(self) -> str:
        """In one line."""
        changes = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.set.items()]
        changes += [f"without {json.dumps(key)}" for key in self.remove]
        return "; ".join(filter(None, (", ".join(changes), self.note)))

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        says = {"problem": self.problem, "cost": self.cost, "fix": self.fix}
        return {"check": self.check, "severity": self.severity, **says, "set": dict(self.set), "remove": [*self.remove]}
