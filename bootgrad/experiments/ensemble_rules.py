"""Rules for λ in an ensemble of diagonal networks: each copy has its own, which is shown the steps of that copy alone.

    θ ← θ − η (ḡ + λ ∇R),    R = Reg2 + ratio · Reg1

Letters: ``S`` seeds (data sets), ``M`` settings, ``C`` = S·M copies, ``D`` inputs, ``P`` = 2D parameters.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..seen import Added, Seen
from ..strengths import Rule
from .ensembles import diagonal_network, penalized_gradient
from .image_runs import LOSSES, MEASURES
from .sparse_regression import BATCH, INPUTS, PENALTY, RATIO, START, Problem, Setting
from .sparse_regression import train as train_by_constants
from .table import Row

_PENALTY = "reg2"  # λ is that of Reg2


def evaluate(
    make: Callable[[float, float], Rule] | None, seeds: Sequence[int], grid: Sequence[Setting], steps: int
) -> list[Row]:
    """Sparse regression with λ (Reg2 + ½ Reg1): a row for each setting and seed, with the columns of runs on images.

    Args:
        make: (``strength``, ``lr``) → the rule of a copy; None where ``strength`` is λ itself.
        seeds: of the data sets.
        grid: settings with ``lr`` and ``strength``.
        steps: how many.
    """
    problem = Problem(seeds)
    pairs = [(float(s["lr"]), float(s["strength"])) for s in grid]
    lrs, values = zip(*pairs, strict=True)
    if make is None:
        theta = train_by_constants(PENALTY, problem, [{**s, "ratio": RATIO} for s in grid], steps)
        strength = torch.tensor(values).expand(len(seeds), -1)
    else:
        rules = [make(value, lr) for _ in seeds for lr, value in pairs]
        theta, strength = train(problem, lrs, rules, RATIO, steps)
    whole = diagonal_network(theta, *problem.train)
    train_loss, test_loss = whole.loss, problem.test_loss(theta)
    found = {
        "train_loss": train_loss,
        "validation_loss": diagonal_network(theta, *problem.validation).loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "gamma": whole.covariance_trace,
        "reg1": RATIO * strength,
        "reg2": strength,
    }
    rows: list[Row] = []
    for m, (lr, value) in enumerate(pairs):
        for s, seed in enumerate(seeds):
            row = dict.fromkeys(MEASURES, math.nan) | {name: float(part[s, m]) for name, part in found.items()}
            if not math.isfinite(row["gap"]):  # it diverged
                row |= dict.fromkeys(found, math.nan) | dict.fromkeys(LOSSES, math.inf)
            rows.append({"lr": lr, "strength": value, "seed": seed, **row, "steps": steps})
    return rows


def train(
    problem: Problem, lrs: Sequence[float], rules: Sequence[Rule], ratio: float, steps: int
) -> tuple[Tensor, Tensor]:
    """SGD with λ (Reg2 + ratio · Reg1) about the full gradient, λ by rules, on the batches of `sparse_regression.train`.

    Args:
        problem: S data sets.
        lrs: η of the M settings.
        rules: C of them, those of the first seed's settings first.
        ratio: λ₁/λ₂.
        steps: how many.

    Returns:
        Parameters (S, M, P), and λ (S, M) of the last step.
    """
    x, _ = problem.train
    shape = len(x), len(lrs)
    lr = x.new_tensor(lrs)[:, None]
    generator = torch.Generator().manual_seed(0)
    theta = x.new_full((*shape, 2 * INPUTS), START)
    for number in range(steps):
        part = problem.batch(BATCH, generator)
        total, mean = penalized_gradient(diagonal_network, theta, part, ratio, 1.0, whole=problem.train)
        added = total - mean  # ∇R
        step = Step(number, mean.flatten(0, 1), added.flatten(0, 1))
        seen = [SeenCopy(step, copy, rule.due(number)) for copy, rule in enumerate(rules)]
        strength = x.new_tensor([_strength(rule, s) for rule, s in zip(rules, seen, strict=True)]).view(shape)
        theta = theta - lr * (mean + strength[..., None] * added)
        for rule, s in zip(rules, seen, strict=True):
            rule.after(s)
    return theta, strength


def _strength(rule: Rule, seen: Seen) -> float:
    """λ of a step; in place of a trial, that which is found of ∇R."""
    if seen.is_measured and rule.trial is not None:
        return rule.found(seen.added)
    return rule.strength(_PENALTY, seen.step)


class Step:
    """A step of all copies: what a rule asks of one is computed for all of them at once, and not before.

    Args:
        number: of the step.
        mean: ḡ (C, P).
        added: ∇R (C, P).
    """

    def __init__(self, number: int, mean: Tensor, added: Tensor):
        """Compute nothing yet."""
        self.number, self.mean, self.added = number, mean, added

    @cached_property
    def is_finite(self) -> list[bool]:
        """Whether ḡ and ∇R of each copy are."""
        return (self.mean.isfinite() & self.added.isfinite()).all(-1).tolist()

    @cached_property
    def norms(self) -> list[list[float]]:
        """‖ḡ‖ and ‖∇R‖ of each copy."""
        return torch.stack([self.mean, self.added], 1).double().norm(dim=-1).tolist()


class AddedCopy(Added):
    """∇R of one copy."""

    def __init__(self, step: Step, copy: int):
        """Keep the step."""
        self._of_all, self._copy, self._parameters, self._taken = step, copy, {"theta": step.mean}, 1.0

    def norms(self):
        """‖ḡ‖ and ‖∇R‖."""
        loss, penalty = self._of_all.norms[self._copy]
        return loss, penalty

    def gradient(self):
        """∇R, in memory of its own."""
        return {"theta": self._of_all.added[self._copy].clone()}


class SeenCopy(Seen):
    """A step, as the rule of one copy is shown it."""

    def __init__(self, step: Step, copy: int, is_measured: bool):
        """Keep the step."""
        self.penalty, self.step, self.batch_size = _PENALTY, step.number, BATCH
        self.mean = {"theta": step.mean[copy]}
        self.is_measured, self.has_center = is_measured, True
        self._of_all, self._copy, self._added = step, copy, AddedCopy(step, copy)

    def is_finite(self):
        """Whether this copy's gradients are."""
        return self._of_all.is_finite[self._copy]

    def spreads(self):
        """Not told."""
        return math.nan, math.nan
