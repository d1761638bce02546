"""How many examples tests draw: a few, the same ones in every run; by FUZZ_EXAMPLES=N that many, other ones in every run."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 0)


def drawn(few: int) -> settings:
    """Settings with ``few`` examples, where no other number is asked for."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
