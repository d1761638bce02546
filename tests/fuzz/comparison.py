"""A program's quantities by bootgrad, compared with the oracle's, or refused where that is right."""

import re
import warnings
from collections.abc import Callable

import torch
from hypothesis import reject
from torch import Tensor
from torch.func import functional_call

import bootgrad
from bootgrad import reference
from bootgrad.errors import RecordingError, UnsupportedError

from ..oracle import Oracle, parameters_of, random_like, record
from .architectures import network_of
from .losses import losses
from .operations import OPERATIONS
from .programs import Program

RELATIVE = 1e-8  # of a quantity of a parameter to itself
ONE_BY_ONE = r"one sample at a time|puts out \d+ rows in dimension 0 for \d samples|or of rows in another order"
ROUNDING = 1e-12  # and of any to the largest of its kind: what cancels leaves so much
LARGEST = 1e4  # programs with larger gradients are rounding, and are left out


class Case:
    """A network of a program and what the oracle has to say of it."""

    def __init__(self, program: Program):
        self.program, self.model = program, network_of(program)
        self.inputs = self.model.inputs
        self.parameters = parameters_of(self.model)
        if not self.parameters:
            reject()
        try:
            self.oracle = Oracle(self.model, self.run)
            self.reg1 = self.oracle.gradient(self.oracle.reg1())
            self.of_inputs = self._of_inputs()
        except RuntimeError:  # plain torch objects, mostly to what is changed in place
            reject()
        self.rows = {name: rows.detach() for name, rows in self.oracle.rows.items()}
        self.D = self.oracle.matrix.detach()
        if not self.D.any():  # nothing is reached
            reject()
        self.largest = max(float(self.D.abs().max()), 1e-3)
        sizes = [self.oracle.losses, self.D, *self.reg1.values()]
        if not all(bool(t.isfinite().all()) and float(t.detach().abs().max()) < LARGEST for t in sizes):
            reject()
        self.center = random_like(self.parameters)
        self.c = torch.cat([c.flatten() for c in self.center.values()])

    def run(self) -> Tensor:
        """Losses, the same in every run."""
        torch.manual_seed(self.program.seed)
        model = self.model
        if self.program.functional:
            values = functional_call(model, dict(model.named_parameters()), tuple(self.inputs))
        else:
            values = model(*self.inputs)
        return losses(self.program.loss, values, list(self.parameters.values()))

    def mark(self) -> None:
        """Set each ``.grad`` to ones, which are added to, and are left alone by an error."""
        for leaf in (*self.parameters.values(), *self.inputs):
            leaf.grad = torch.ones_like(leaf) if leaf.requires_grad else None

    def _of_inputs(self) -> list[Tensor]:
        """∇ℓ_i by each input that requires grad, (B, B, *shape)."""
        leaves = [x for x in self.inputs if x.requires_grad]
        rows = reference.per_sample_gradients_of(self.oracle.losses, dict(enumerate(leaves))) if leaves else {}
        return list(rows.values())

    @property
    def smooth(self) -> bool:
        """Whether finite differences tell derivatives."""
        nodes = self.program.nodes
        detached = any(node.call == "detached" or "half_detached" in node.weights() for node in nodes)
        return not detached and all(OPERATIONS[node.op].smooth for node in nodes)

    @property
    def refusals(self) -> list[str]:
        """Patterns of the errors that are right."""
        return [pattern for node in self.program.nodes if (pattern := OPERATIONS[node.op].refused)]


def compare(program: Program) -> bool:
    """Whether bootgrad did the program, with the oracle's results, or refused it, as it may.

    Raises:
        AssertionError: a wrong number, a refusal that is none, or a changed ``.grad``.
        Exception: whatever else came of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, and bootgrad's of what is slow
        case = Case(program)
        try:
            for check in CHECKS:
                case.mark()
                check(case)
        except RecordingError as error:
            _check_refusal(case, error)
            return False
    return True


def _check_refusal(case: Case, error: RecordingError) -> None:
    if not any(re.search(pattern, str(error)) for pattern in case.refusals):
        raise AssertionError(f"refused: {error}") from error
    is_general = re.search(r"batch_norm in training mode|modified by an inplace", str(error))
    assert is_general or any(name in str(error) for name in case.parameters), f"no parameter is named: {error}"
    for name, p in case.parameters.items():
        assert torch.equal(p.grad, torch.ones_like(p)), f".grad of {name} was touched by an error: {error}"


def near(ours: Tensor, expected: Tensor, largest: float, what: str, relative: float = RELATIVE) -> None:
    """Fail unless the values agree, to digits of their own and to rounding of the ``largest`` of their kind."""
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)} where {tuple(expected.shape)} was expected"
    error = float((ours.detach() - expected.detach()).abs().max())
    bound = relative * float(expected.detach().abs().max()) + ROUNDING * largest
    assert error <= bound, f"{what}: {ours.detach()} where {expected.detach()} was expected, off by {error:.1e}"


def _near_gradients(ours, expected: dict[str, Tensor], largest: float, what: str, relative: float = RELATIVE) -> None:
    largest = max(largest, *(float(e.abs().max()) for e in expected.values()))
    for (name, e), g in zip(expected.items(), ours, strict=True):
        near(torch.zeros_like(e) if g is None else g, e, largest, f"{what} by {name}", relative)


def first_order(case: Case) -> None:
    """One backward pass with statistics."""
    D, c, B = case.D, case.c, case.program.batch
    ones = torch.ones(B, dtype=torch.float64)
    uneven = ones.cumsum(0) - 2
    reduction, a = [("mean", ones / B), ("sum", ones), (uneven, uneven)][case.program.seed % 3]
    rec, values = record(case.model, case.run)
    stats = rec.backward(values, reduction=reduction, center=case.center)
    square = max(case.largest, 1.0) ** 2 * D.size(1)
    for name, rows in case.rows.items():
        flat, own = rows.reshape(B, -1), stats.per_parameter[name]
        near(own.sq_norms, flat.square().sum(1), square, f"sq_norms of {name}")
        near(
            own.deviation_sq_norms,
            (flat - case.center[name].flatten()).square().sum(1),
            square,
            f"deviations of {name}",
        )
        expected = 1 + torch.tensordot(a, rows, 1)
        near(case.parameters[name].grad, expected, case.largest, f".grad of {name}")
    near(stats.sq_norms, D.square().sum(1), square, "sq_norms")
    near(stats.covariance_trace, (D - D.mean(0)).square().sum(1).mean(), square, "covariance trace")
    near(stats.deviation_sq_norms, (D - c).square().sum(1), square, "deviations")
    near(stats.reg2, (D.mean(0) - c).square().sum(), square, "reg2 of statistics")
    for x, rows in zip((x for x in case.inputs if x.requires_grad), case.of_inputs, strict=True):
        near(x.grad, 1 + torch.tensordot(a, rows, 1), case.largest, ".grad of an input")


def products(case: Case) -> None:
    """The matrix without a graph."""
    D, B = case.D, case.program.batch
    rec, values = record(case.model, case.run)
    G = rec.per_sample_gradients(values)
    square = case.largest**2 * D.size(1)
    w = torch.arange(B, dtype=torch.float64) - 1
    near(G @ case.center, D @ case.c, case.largest * D.size(1), "G @ v")
    near(torch.cat([t.flatten() for t in (G.T @ w).values()]), w @ D, case.largest, "G.T @ w")
    near(torch.cat([t.flatten() for t in G.mean().values()]), D.mean(0), case.largest, "mean")
    near(G.gram(), D @ D.T, square, "gram")
    near(G.deviation_sq_norms(), (D - D.mean(0)).square().sum(1), square, "deviations from the mean")
    near(G[[B - 1, 0]].sq_norms(), D[[B - 1, 0]].square().sum(1), square, "norms of chosen rows")
    for name, rows in G.materialize().items():
        near(rows, case.rows[name], case.largest, f"rows of {name}")


def second_order(case: Case) -> None:
    """Values and derivatives of penalties on the matrix."""
    oracle, parameters = case.oracle, list(case.parameters.values())
    rec, values = record(case.model, case.run)
    G = rec.per_sample_gradients(values, create_graph=True)
    pairs = {
        "reg1": (bootgrad.reg1(G), oracle.reg1()),
        "reg1 about a center": (bootgrad.reg1(G, case.center), oracle.reg1(case.c)),
        "reg2": (bootgrad.reg2(G, case.center), oracle.reg2(case.c)),
        "norms": (G.sq_norms().mean(), oracle.matrix.square().sum(1).mean()),
    }
    square = max(case.largest, 1.0) ** 2 * case.D.size(1)
    for what, (ours, expected) in pairs.items():
        near(ours, expected, square, what)
        grads = [None] * len(parameters)
        if ours.requires_grad:
            grads = torch.autograd.grad(ours, parameters, retain_graph=True, allow_unused=True)
        _near_gradients(grads, oracle.gradient(expected), square, f"gradient of {what}")


def regularizer(case: Case) -> None:
    """A step with exact penalties."""
    oracle = case.oracle
    center, expected = [
        ("batch_mean", oracle.reg1()),
        ("zero", oracle.reg1(torch.zeros_like(case.c)) + 0.5 * oracle.reg2(torch.zeros_like(case.c))),
        (case.center, oracle.reg1(case.c) + 0.5 * oracle.reg2(case.c)),
    ][case.program.seed % 3]
    options = dict(reg1=0.5, reg2=0.0 if center == "batch_mean" else 0.25, center=center)
    bootgrad.GradientRegularizer(case.model, **options).backward(case.run)
    wanted = {name: 1 + g for name, g in oracle.gradient(oracle.losses.mean() + 0.5 * expected).items()}
    square = max(case.largest, 1.0) ** 2 * case.D.size(1)
    _near_gradients(
        [p.grad for p in case.parameters.values()],
        wanted,
        square,
        f"step about {center if isinstance(center, str) else 'a center'}",
    )


def finite_differences(case: Case) -> None:
    """A step with Reg1 by finite differences, on a part of the smooth programs."""
    if not case.smooth or case.program.seed % 2:
        return
    oracle = case.oracle
    wanted = oracle.gradient(oracle.losses.mean() + 0.1 * oracle.reg1())
    largest = max(float(g.abs().max()) for g in wanted.values())
    errors = {}
    for epsilon in (1e-7, 1e-9):  # a shorter step where third derivatives are large
        case.mark()
        reg = bootgrad.GradientRegularizer(case.model, reg1=0.1, method="finite_difference", epsilon=epsilon)
        try:
            reg.backward(case.run)
        except UnsupportedError as error:
            if re.search(ONE_BY_ONE, str(error)):
                return
            raise
        errors = {name: float((p.grad - 1 - wanted[name]).abs().max()) for name, p in case.parameters.items()}
        if max(errors.values()) <= 1e-3 * largest + 1e-6 * case.largest:
            return
    raise AssertionError(f"finite differences: off by {errors}, the largest entry is {largest}")


CHECKS: tuple[Callable, ...] = (first_order, products, second_order, regularizer, finite_differences)
