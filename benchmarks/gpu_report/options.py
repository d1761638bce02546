"""What a report is asked for; children get it as JSON."""

import dataclasses
import json
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """What to run on.

    Attributes:
        device: ``cuda``, or ``cpu``: the same code at tiny sizes, Triton interpreted.
        ops: only those whose names contain one of these.
        models: only these tasks.
        backends: only these.
        spoil: an op whose results are made wrong, or "abort" and one whose process ends, for the report's own tests.
        limits: measured ceilings: ``copy`` in bytes and rates by dtype in operations per second.
        until: the time at which a section must be over.
    """

    device: str = "cuda"
    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    spoil: str = ""
    limits: dict[str, float] = field(default_factory=dict)
    until: float = float("inf")

    @property
    def tiny(self) -> bool:
        """Whether sizes are those that a CPU can do."""
        return self.device == "cpu"

    def wants(self, op: str) -> bool:
        """Whether an op is asked for."""
        return not self.ops or any(part in op for part in self.ops)

    def left(self) -> float:
        """Seconds until the section must be over."""
        return self.until - time.time()

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loads(text: str) -> "Options":
        """From JSON."""
        values = json.loads(text)
        return Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
