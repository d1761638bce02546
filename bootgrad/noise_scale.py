"""The gradient noise scale, averaged over steps: how large a batch is worth its price."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, SupportsFloat

from .errors import ArgumentError, ArgumentTypeError


class HasMoments(Protocol):
    """What a batch's statistics and reports have."""

    @property
    def covariance_trace(self) -> SupportsFloat:
        """Γ."""

    @property
    def sq_mean_norm(self) -> SupportsFloat:
        """‖ḡ‖²."""

    @property
    def batch_size(self) -> int:
        """B."""


class NoiseScale:
    """The gradient noise scale from averages of its two unbiased parts over steps.

        S = Γ B/(B − 1)     |G|² = ‖ḡ‖² − S/B     noise scale = ⟨S⟩ / ⟨|G|²⟩

    The plug-in ratio Γ/‖ḡ‖² of one batch saturates near B; averaging the parts before dividing does not.

    Args:
        decay: weight of the past in the running means, bias-corrected; 1 averages all steps alike.

    Source: McCandlish et al., arXiv 1812.06162, appendix A.
    """

    def __init__(self, decay: float = 0.99):
        """Start with no steps."""
        if not 0 < decay <= 1:
            raise ArgumentError(f"decay must be in (0, 1]; got {decay}")
        self.decay = decay
        self.steps = 0
        self._weight = self._trace = self._sq_norm = 0.0

    def update(self, moments: HasMoments) -> float:
        """Take in one batch: anything with ``covariance_trace``, ``sq_mean_norm`` and ``batch_size``; returns the value.

        One whose trace is not known, nan as of steps between random signs, or whose gradient is not finite, as of steps that a
        GradScaler skips, is left out.

        Raises:
            ArgumentError: a batch of one sample.
            ArgumentTypeError: something else than statistics or a report.
        """
        try:
            B, trace, sq_norm = moments.batch_size, float(moments.covariance_trace), float(moments.sq_mean_norm)
        except AttributeError as error:
            raise ArgumentTypeError(
                f"update takes the bootgrad.Statistics or bootgrad.Report of a batch; got {type(moments).__name__}"
            ) from error
        if B < 2:
            raise ArgumentError("the noise scale needs batches of at least two samples; got one")
        trace *= B / (B - 1)
        sq_norm -= trace / B
        if not math.isfinite(trace) or not math.isfinite(sq_norm):
            return self.value
        new = 1.0 if self.decay == 1 else 1 - self.decay
        self._weight = self._weight * self.decay + new
        self._trace = self._trace * self.decay + new * trace
        self._sq_norm = self._sq_norm * self.decay + new * sq_norm
        self.steps += 1
        return self.value

    @property
    def covariance_trace(self) -> float:
        """⟨S⟩, the averaged unbiased covariance trace; nan before the first step."""
        return self._trace / self._weight if self.steps else float("nan")

    @property
    def sq_mean_norm(self) -> float:
        """⟨|G|²⟩, the averaged unbiased squared norm of the true gradient; may be negative; nan before the first step."""
        return self._sq_norm / self._weight if self.steps else float("nan")

    @property
    def value(self) -> float:
        """The ratio; inf where the denominator is not positive, nan where nothing is known. `reason` says why."""
        if not self.steps or (self._sq_norm <= 0 and self._trace <= 0):
            return float("nan")
        return float("inf") if self._sq_norm <= 0 else self._trace / self._sq_norm

    @property
    def reason(self) -> str | None:
        """Why the value is not a number, or None."""
        if not self.steps:
            return "no step has been taken in"
        if self._sq_norm > 0:
            return None
        if self._trace <= 0:
            return "all gradients were zero"
        return f"the gradient's squared norm is lost in the noise: its estimate over {self.steps} steps is not positive"

    def state_dict(self) -> dict[str, Any]:
        """The averages, to go on from."""
        return {"decay": self.decay, "steps": self.steps, "parts": [self._weight, self._trace, self._sq_norm]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; on an error, all is as before."""
        try:
            decay, steps, (weight, trace, sq_norm) = (
                float(state["decay"]),
                int(state["steps"]),
                map(float, state["parts"]),
            )
            if not 0 < decay <= 1 or steps < 0 or (steps and not weight > 0):
                raise ValueError(f"decay {decay}, {steps} steps of weight {weight}")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ArgumentError(f"not a state_dict of a NoiseScale: {error!r}") from None
        self.decay, self.steps = decay, steps
        self._weight, self._trace, self._sq_norm = weight, trace, sq_norm
