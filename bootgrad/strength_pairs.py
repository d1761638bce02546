"""The strengths of Reg1 and Reg2: what users give, what a step takes of each penalty, and what rules are shown of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import waiting
from .center_pairs import PENALTIES, Centers
from .centers import BatchMean
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .methods.base import Directions, Gradients
from .penalties import Distances, Report
from .seen import Added, Seen
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
        trial: what that is taken with in place of its λ, which is found from it.
        turn: the one that is taken alone, for both.
        needs_mean: whether a rule asks for ḡ.
        notes: for the report.
    """

    asked: Mapping[str, float]
    taken: Mapping[str, float]
    measured: str | None
    trial: float | None
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

    def claim(self) -> None:
        """Take the rules for good: with another model one would go on from the λ and the gradients of the first.

        Raises:
            ArgumentError: a rule that was taken before.
        """
        for name, rule in self._rules.items():
            if rule.is_taken:
                raise ArgumentError(
                    f"{name} is a rule that another regularizer has, whose λ it holds: make a rule for each of them"
                )
        for rule in self._rules.values():
            rule.is_taken = True

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
        if self._rules and waiting.is_capturing():
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
        may_measure = {name: rule for name, rule in self._rules.items() if name in known and rule.due(step)}
        trials = {name: _trial(name, rule.trial) for name, rule in may_measure.items() if rule.trial is not None}
        notes = [_bounded(name, asked[name]) for name, rule in self._rules.items() if rule.is_bounded]
        for name, strength in asked.items() if step % every == 0 else ():
            strength = trials.get(name, strength)
            if strength and name not in known:
                notes.append(_FIRST_STEP[name])
            elif not strength and name in self._rules and self._rules[name].trial is not None:
                notes.append(f"{name} was left out: its rule has measured no λ yet")
            if strength and (name == "reg1" or values[name] is not None):
                taken[name] = every * strength
        due = [name for name in may_measure if name in taken]
        turn = self._owed if self._owed in taken else due[0] if due and len(taken) == 2 else None
        if turn is not None:
            notes.append(f"{turn} was taken alone, twice as strong: the penalties take turns where one is measured")
            taken, due = {turn: 2 * taken[turn]}, [name for name in due if name == turn]
        measured = due[0] if due else None
        trial = None if measured is None else trials.get(measured)
        needs_mean = measured is not None or any(rule.waits for rule in self._rules.values())
        return Plan(asked, taken, measured, trial, turn, needs_mean, notes)

    def added(
        self,
        plan: Plan,
        outcome: Gradients,
        parameters: Mapping[str, Tensor],
        distances: Distances,
    ) -> Added | None:
        """What the measured penalty has added to the gradient of a step; None where none is measured."""
        if plan.measured is None:
            return None
        return Added(outcome, parameters, plan.measured, plan.taken[plan.measured], distances)

    def settled(self, plan: Plan, added: Added | None) -> Plan:
        """The plan with the λ that a trial has found, after its gradient was scaled to that.

        Raises:
            ArgumentError: a λ that is negative or not finite, or over the trial is not.
        """
        if plan.trial is None or plan.measured is None or added is None:
            return plan
        name, rule = plan.measured, self._rules[plan.measured]
        is_told = added.is_finite() and not added.is_empty()
        found = _number(name, rule.found(added)) if is_told else 0.0
        if not math.isfinite(found / plan.trial):
            raise ArgumentError(
                f"{name} must be found with a trial that is not so far from it; got {found} with {plan.trial}"
            )
        added.rescale(found / plan.trial)
        notes = list(plan.notes)
        if not found:
            notes.append(f"{name} was left out: its gradient is zero, or was lost in rounding or overflow")
        elif not plan.asked[name] and found in (rule.low, rule.high):
            notes.append(_bounded(name, found))
        return replace(plan, asked={**plan.asked, name: found}, notes=notes)

    def after(
        self,
        step: int,
        plan: Plan,
        outcome: Gradients,
        added: Added | None,
        has_center: bool,
        report: Report,
        finite: Tensor | None,
    ) -> None:
        """Show the rules a step of which all is known and nothing is written yet; `count` is to follow."""
        for name, rule in self._rules.items():
            own = added if name == plan.measured and added is not None and not added.is_empty() else None
            rule.after(Seen(name, step, outcome, report, finite, own, has_center))

    def count(self, plan: Plan, finite: Tensor | None) -> None:
        """Take in whose turn it was."""
        if plan.turn is not None and (finite is None or bool(finite)):
            self._owed = None if plan.turn == self._owed else next(name for name in PENALTIES if name != plan.turn)

    def state_dict(self) -> dict[str, Any]:
        """The rules' states, and whose turn it is; empty where there are no rules."""
        rules = {name: {"rule": type(rule).__name__, **rule.state_dict()} for name, rule in self._rules.items()}
        return {"owed": self._owed, **rules} if rules else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; rules of penalties that had none begin anew.

        Raises:
            ValueError: a state of other rules.
        """
        rules = self._rules
        for name, rule in rules.items():
            if name in state and state[name]["rule"] != type(rule).__name__:
                raise ValueError(f"{name} is a {type(rule).__name__} here, and was a {state[name]['rule']}")
        owed = state["owed"] if state else None
        if owed not in (None, *PENALTIES):
            raise ValueError(f"{owed!r} is no penalty")
        before = self.state_dict()
        try:
            for name, rule in rules.items():
                if name in state:
                    rule.load_state_dict(state[name])
                else:
                    rule.reset()
        except Exception:
            for name, rule in rules.items():
                rule.load_state_dict(before[name])
            raise
        self._owed = owed


def _bounded(name: str, strength: float) -> str:
    return f"the λ of {name} is held at {strength:.6g}, a bound of its rule"


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


def _trial(name: str, given: Any) -> float:
    trial = _number(f"the trial of {name}", given)
    if not trial:
        raise ArgumentError(
            f"the trial of {name} must be above zero, for λ is found from the gradient that it adds; got {trial}"
        )
    return trial


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
