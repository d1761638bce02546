"""One architecture's gradient, norms, Γ and penalties' gradients against autograd, one backward pass per sample.

Letters: ``B`` samples, ``P`` parameters; g_i is sample i's gradient, ḡ their mean, c a center.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import bootgrad
from bootgrad import reference
from bootgrad.rules.weight_norm import weight_norm

from .architecture import B, Setting

# Rounding errors of float64 in some hundred operations, differentiated twice, and room for what cancels in a penalty.
TOLERANCE = 1e-9
# O(ε) of the penalty's third derivative, and rounding errors of float64 over ε.
DIFFERENCES = 1e-2
# Of a parameter whose gradient is zero, a key's bias for one, what is left are rounding errors of the others.
NEGLIGIBLE = 1e-3


class Record(NamedTuple):
    """What a comparison saw: how many operations use parameters, and which of them had no rule."""

    operations: int
    without_rule: tuple[str, ...]


def compare(setting: Setting, differences: bool) -> Record:
    """Compare all quantities; raise where one is wrong."""
    oracle = Oracle(setting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bootgrad.BootgradWarning)
        operations = check_statistics(setting, oracle)
        for penalty in oracle.penalties:
            check_penalty(setting, oracle, penalty)
        for penalty in (("reg1", "batch_mean"), ("reg2", "center")) if differences else ():
            check_differences(setting, oracle, penalty)
    found = [re.match(r"(\S+) on .* has no rule", str(w.message)) for w in caught]
    return Record(operations, tuple(sorted({match[1] for match in found if match})))


def parameters_of(setting: Setting) -> dict[str, Tensor]:
    return {name: p for name, p in setting.model.named_parameters() if p.requires_grad}


def losses_of(setting: Setting) -> Tensor:
    torch.manual_seed(5)  # of dropout and noise
    with InDouble():
        return setting.losses(*setting.inputs)


class InDouble(TorchFunctionMode):
    """Float64 where a model's code asks for float32, as many do for their norms and softmax, whatever their weights are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return func(*args, **kwargs)


class WrittenOut(TorchFunctionMode):
    """Plain operations in the place of torch functions with a wrong second derivative in torch, or without one, or float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def bag(input: Tensor, weight: Tensor, offsets=None, *_, mode: str, per_sample_weights=None, **options) -> Tensor:
    """Sums or means of rows; input (B, n)."""
    assert offsets is None and per_sample_weights is None
    return getattr(weight[input], mode)(1)


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor, bias=None, out_dtype=None) -> Tensor:
    """Rows in groups, each times its matrix, in float64, too."""
    assert bias is None and out_dtype is None
    return torch.cat([a @ b for a, b in zip(mat_a.tensor_split(offs.tolist()[:-1]), mat_b, strict=True)])


WRITTEN_OUT = {
    torch._weight_norm: weight_norm,
    F.embedding_bag: bag,
    torch._grouped_mm: grouped_mm,
}


class Oracle:
    """Plain torch's answers."""

    def __init__(self, setting: Setting):
        parameters = parameters_of(setting)
        wanted = list(parameters.values())
        with sdpa_kernel(SDPBackend.MATH), WrittenOut():  # torch's fused attention has no second derivative
            losses = losses_of(setting)
            rows = reference.per_sample_gradients_of(losses, parameters, create_graph=True)
        self.rows = {name: r.detach().reshape(B, -1) for name, r in rows.items()}
        self.G = reference.matrix(self.rows)
        scale = self.G.square().mean().sqrt()  # the center is as long as a gradient, so that neither hides the other
        generator = torch.Generator().manual_seed(3)
        self.center = {
            name: scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()
        }
        self.c = torch.cat([t.flatten() for t in self.center.values()])
        penalties = {
            ("reg1", "batch_mean"): sum((r - r.mean(0)).square().sum() / B for r in rows.values()),
            ("reg1", "zero"): sum(r.square().sum() / B for r in rows.values()),
            ("reg2", "center"): sum((r.mean(0) - self.center[name]).square().sum() for name, r in rows.items()),
        }
        options = dict(retain_graph=True, materialize_grads=True)
        self.plain = torch.autograd.grad(losses.mean(), wanted, **options)
        self.penalties = {key: torch.autograd.grad(value, wanted, **options) for key, value in penalties.items()}
        self.values = {key: value.detach() for key, value in penalties.items()}


def check_statistics(setting: Setting, oracle: Oracle) -> int:
    """The plain gradient, norms, Γ and distances from a center, of one backward pass; returns the number of operations."""
    setting.model.zero_grad()
    with bootgrad.record(setting.model, samples=setting.samples) as rec:
        losses = losses_of(setting)
    operations = len(rec.operations)
    stats = rec.backward(losses, center=oracle.center)
    check_gradients(setting, oracle.plain, oracle.plain)
    longest = float(reference.sq_norms(oracle.G).max())
    for name, rows in oracle.rows.items():
        ours = stats.per_parameter[name].sq_norms
        check(ours, rows.square().sum(1), name, atol=NEGLIGIBLE * TOLERANCE * longest)
    check(stats.sq_norms, reference.sq_norms(oracle.G), "norms")
    check(stats.deviation_sq_norms, reference.deviation_sq_norms(oracle.G, oracle.c), "distances")
    check(stats.covariance_trace, reference.covariance_trace(oracle.G), "Γ")
    return operations


def step(setting: Setting, oracle: Oracle, penalty: tuple[str, str], **options: Any) -> bootgrad.Report:
    """A step with one penalty."""
    kind, about = penalty
    setting.model.zero_grad()
    center = oracle.center if about == "center" else about
    reg = bootgrad.GradientRegularizer(setting.model, **{kind: 1.0}, center=center, **options)
    if reg.method != "exact":
        return reg.backward(lambda: losses_of(setting))
    with reg.record(samples=setting.samples):
        losses = losses_of(setting)
    return reg.backward(losses)


def check_penalty(setting: Setting, oracle: Oracle, penalty: tuple[str, str]) -> None:
    """The gradient that a step leaves, and the penalty's value."""
    report = step(setting, oracle, penalty)
    total = [g + p for g, p in zip(oracle.plain, oracle.penalties[penalty], strict=True)]
    check_gradients(setting, total, oracle.penalties[penalty])
    check(getattr(report, penalty[0]), oracle.values[penalty], penalty[0])


def check_differences(setting: Setting, oracle: Oracle, penalty: tuple[str, str]) -> None:
    """The same by finite differences, so small ones that kinks do not show."""
    step(setting, oracle, penalty, method="finite_difference", epsilon=1e-9)
    pairs = zip(parameters_of(setting).values(), oracle.plain, strict=True)
    ours = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad - g).flatten() for p, g in pairs])
    exact = torch.cat([g.flatten() for g in oracle.penalties[penalty]])
    assert float((ours - exact).norm()) <= DIFFERENCES * float(exact.norm())


def check_gradients(setting: Setting, expected: Sequence[Tensor], part: Sequence[Tensor]) -> None:
    """``.grad`` is as ``expected``, up to errors that are small beside the ``part`` of it in question."""
    largest = max(float(g.norm()) for g in part)
    assert largest > NEGLIGIBLE * max(float(g.norm()) for g in expected)
    for (name, p), e, g in zip(parameters_of(setting).items(), expected, part, strict=True):
        error = float((e if p.grad is None else p.grad - e).norm())
        allowed = TOLERANCE * (float(g.norm()) + NEGLIGIBLE * largest)
        assert error <= allowed, f"{name}: error {error:.2e} of {float(g.norm()):.2e}, allowed {allowed:.2e}"


def check(ours: Tensor, expected: Tensor, what: str, atol: float = 0.0) -> None:
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=atol, msg=lambda m: f"{what}: {m}")
