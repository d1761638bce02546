"""The strengths of Reg1 and Reg2: what users give, what a step takes of each penalty, and what rules are shown of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import graph
from .center_pairs import PENALTIES, Centers
from .centers import BatchMean
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .methods.base import Directions, Gradients
from .penalties import Report
from .seen import Seen
from .strengths import AUTO, Rule

Strength = float | str | Callable[[int], float] | Rule
_FIRST_STEP = {
    "reg1": "reg1 was taken about the batch mean: its center knows nothing before the first step",
    "reg2": "reg2 was left out: its center knows nothing before the first step",
}


@dataclass(frozen=True)
class Plan:
    """What a step takes of the penalties.

    Attributes:
        asked: λ by penalty.
        taken: what each of those that are taken is multiplied by, λ times the steps it stands for.
        measured: the penalty whose gradient rules are shown.
        turn: the one that is taken alone, for both.
        needs_mean: whether a rule asks for ḡ.
        notes: for the report.
    """

    asked: Mapping[str, float]
    taken: Mapping[str, float]
    measured: str | None
    turn: str | None
    needs_mean: bool
    notes: list[str]


class Strengths:
    """Numbers, functions of the step, and rules, by penalty.

    Attributes:
        given: what was given, rules in the place of their names.
    """

    def __init__(self, reg1: Any, reg2: Any):
        """Check them.

        Raises:
            ArgumentError: a number out of range, or one rule for both penalties.
            ArgumentTypeError: anything else.
        """
        self.given: dict[str, Strength] = {name: _parsed(name, s) for name, s in (("reg1", reg1), ("reg2", reg2))}
        if len(self._rules) == 2 and reg1 is reg2 and isinstance(reg1, Rule):
            raise ArgumentError("reg1 and reg2 are one rule, which has one λ: make a rule for each of them")
        self._owed: str | None = None  # the penalty that was left out for the other one's turn

    @property
    def _rules(self) -> dict[str, Rule]:
        return {name: s for name, s in self.given.items() if isinstance(s, Rule)}

    def is_zero(self, name: str) -> bool:
        """Whether a penalty is never taken."""
        s = self.given[name]
        return not isinstance(s, Rule) and not callable(s) and s == 0

    def asked(self, step: int) -> dict[str, float]:
        """λ for the step that comes, by penalty.

        Raises:
            ArgumentError: a λ that is negative or not finite.
            UnsupportedError: rules, while a graph of kernels is captured.
        """
        if self._rules and graph.is_capturing():
            raise UnsupportedError(
                "a captured graph of kernels would repeat the λ of the step that it was captured from, and its rule would see "
                "none of the others: give λ as a number there"
            )
        return {name: _number(name, _asked(s, name, step)) for name, s in self.given.items()}

    def plan(
        self,
        asked: Mapping[str, float],
        step: int,
        every: int,
        values: Mapping[str, Directions | None],
        centers: Centers,
    ) -> Plan:
        """What the step that comes takes, about centers of which the values are known."""
        taken: dict[str, float] = {}
        known = {name for name in PENALTIES if values[name] is not None or isinstance(centers[name], BatchMean)}
        notes = []
        for name, strength in asked.items() if step % every == 0 else ():
            if strength and name not in known:
                notes.append(_FIRST_STEP[name])
            if strength and (name == "reg1" or values[name] is not None):
                taken[name] = every * strength
        due = [name for name, rule in self._rules.items() if name in taken and name in known and rule.due(step)]
        turn = self._owed if self._owed in taken else due[0] if due and len(taken) == 2 else None
        if turn is not None:
            notes.append(f"{turn} was taken alone, twice as strong: the penalties take turns where one is measured")
            taken, due = {turn: 2 * taken[turn]}, [name for name in due if name == turn]
        measured = due[0] if due else None
        needs_mean = measured is not None or any(rule.waits for rule in self._rules.values())
        return Plan(asked, taken, measured, turn, needs_mean, notes)

    def after(
        self,
        step: int,
        plan: Plan,
        outcome: Gradients,
        parameters: Mapping[str, Tensor],
        values: Mapping[str, Directions | None],
        report: Report,
        finite: Tensor | None,
    ) -> None:
        """Show the rules a step that is done."""
        about_mean = values["reg1"] is None
        is_empty = plan.measured == "reg1" and about_mean and outcome.batch_size == 1  # Reg1 is zero there
        for name, rule in self._rules.items():
            taken = plan.taken[name] if name == plan.measured and not is_empty else None
            seen = Seen(name, step, outcome, parameters, report, finite, taken, not about_mean)
            rule.after(seen)
        if plan.turn is not None and (finite is None or bool(finite)):
            self._owed = None if plan.turn == self._owed else next(name for name in PENALTIES if name != plan.turn)

    def state_dict(self) -> dict[str, Any]:
        """The rules' states, and whose turn it is; empty where there are no rules."""
        rules = {name: {"rule": type(rule).__name__, **rule.state_dict()} for name, rule in self._rules.items()}
        return {"owed": self._owed, **rules} if rules else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; there is nothing to take over from one without rules.

        Raises:
            ValueError: a state of other rules.
        """
        rules = self._rules
        if not state or not rules:
            return
        for name, rule in rules.items():
            if state[name]["rule"] != type(rule).__name__:
                raise ValueError(f"{name} is a {type(rule).__name__} here, and was a {state[name]['rule']}")
        if state["owed"] not in (None, *PENALTIES):
            raise ValueError(f"{state['owed']!r} is no penalty")
        before = self.state_dict()
        try:
            for name, rule in rules.items():
                rule.load_state_dict(state[name])
        except Exception:
            for name, rule in rules.items():
                rule.load_state_dict(before[name])
            raise
        self._owed = state["owed"]


def _parsed(name: str, given: Any) -> Strength:
    if isinstance(given, type) and issubclass(given, Rule):
        raise ArgumentTypeError(f"{name} is the class {given.__name__}: give an object, {given.__name__}(…)")
    if isinstance(given, str) and given == "auto":
        return AUTO()
    if isinstance(given, Rule) or callable(given):
        return given
    return _number(name, given)


def _asked(given: Strength, name: str, step: int) -> Any:
    if isinstance(given, Rule):
        return given.strength(name, step)
    return given(step) if callable(given) else given


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise ArgumentTypeError(
                f'{name} must be a number, a function of the step, "auto" or a rule of bootgrad.strengths; got {value!r}'
            ) from None
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name} must be finite and not negative; got {value}")
    return float(value)
