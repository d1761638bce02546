"""How each library is asked for each quantity, as its documentation says.

A way takes a model of its own, whose hooks it may change, and a batch, and makes a step: a function that fills ``.grad`` of
the model's parameters and returns the quantities.

    norms      ‖g_i‖², (B,)                    .grad = ḡ
    variance   Γ = (1/B) Σ ‖g_i − ḡ‖², ()      .grad = ḡ
    reg1       Γ, ()                           .grad = ḡ + λ ∇Γ
    reg2       ‖ḡ − c‖², (), c constant        .grad = ḡ + λ ∇‖ḡ − c‖²

Libraries are imported in the call that needs them: one that is not installed fails as its own step would.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import bootgrad

from ..models import losses

QUANTITIES = ("norms", "variance", "reg1", "reg2")
STRENGTH = 0.1  # λ
Step = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Way:
    """What one library computes in one step.

    Attributes:
        peer: the library, as rows name it.
        quantities: what the step returns.
        make: makes the step of a model and a batch.
    """

    peer: str
    quantities: tuple[str, ...]
    make: Callable[[nn.Module, Tensor, Tensor], Step]

    @property
    def name(self) -> str:
        """Unique among the ways."""
        return ":".join([self.peer, *self.quantities])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that require grad, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def center(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reg2's constant c: normal numbers, ‖c‖ ≈ 1."""
    generator = torch.Generator().manual_seed(2)
    scale = sum(p.numel() for p in parameters.values()) ** -0.5
    return {n: (scale * torch.randn(p.shape, generator=generator)).to(p.dtype) for n, p in parameters.items()}


def sq_norm(tensors) -> Tensor:
    """Σ ‖t‖² over tensors."""
    return torch.stack([t.square().sum() for t in tensors]).sum()


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The step that the others are measured by."""

    def step():
        losses(model, x, y).mean().backward()
        return {}

    return step


def bootgrad_statistics(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Norms and Γ as a by-product of the backward pass."""

    def step():
        with bootgrad.record(model) as rec:
            values = losses(model, x, y)
        stats = rec.backward(values)
        return {"norms": stats.sq_norms, "variance": stats.covariance_trace}

    return step


def bootgrad_reg1(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Exact Reg1 about the batch mean."""
    reg = bootgrad.GradientRegularizer(model, reg1=STRENGTH)
    return lambda: {"reg1": reg.backward(lambda x, y: losses(model, x, y), x, y).reg1}


def bootgrad_reg2(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Exact Reg2 about a constant."""
    reg = bootgrad.GradientRegularizer(model, reg2=STRENGTH, center=center(trainable(model)))
    return lambda: {"reg2": reg.backward(lambda x, y: losses(model, x, y), x, y).reg2}


def hand_reg2(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Double backward of the batch's gradient, written by hand."""
    parameters = trainable(model)
    c = center(parameters)

    def step():
        mean = losses(model, x, y).mean()
        grads = torch.autograd.grad(mean, list(parameters.values()), create_graph=True)
        reg2 = sq_norm(g - c_p for g, c_p in zip(grads, c.values(), strict=True))
        (mean + STRENGTH * reg2).backward()
        return {"reg2": reg2.detach()}

    return step


def _vmap_rows(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict, Tensor]:
    """All B×P numbers, and the losses (B,)."""

    def loss(parameters, x_i, y_i):
        def stand_in(x):
            return functional_call(model, parameters, (x,))

        value = losses(stand_in, x_i.unsqueeze(0), y_i.unsqueeze(0)).sum()
        return value, value

    return vmap(grad(loss, has_aux=True), (None, 0, 0))(parameters, x, y)


def vmap_statistics(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """`vmap(grad)`, as torch's tutorial has it."""
    parameters = trainable(model)

    def step():
        rows, _ = _vmap_rows(model, {name: p.detach() for name, p in parameters.items()}, x, y)
        for name, p in parameters.items():
            p.grad = rows[name].mean(0)
        norms = sum(g.flatten(1).square().sum(1) for g in rows.values())
        return {"norms": norms, "variance": norms.mean() - sq_norm(p.grad for p in parameters.values())}

    return step


def vmap_reg1(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Γ of `vmap(grad)`'s rows, differentiated."""
    parameters = trainable(model)

    def step():
        rows, values = _vmap_rows(model, parameters, x, y)
        gamma = sq_norm(g - g.mean(0) for g in rows.values()) / len(x)
        (values.mean() + STRENGTH * gamma).backward()
        return {"reg1": gamma.detach()}

    return step


def vmap_reg2(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Reg2 of the mean of `vmap(grad)`'s rows, differentiated."""
    parameters = trainable(model)
    c = center(parameters)

    def step():
        rows, values = _vmap_rows(model, parameters, x, y)
        reg2 = sq_norm(rows[name].mean(0) - c[name] for name in rows)
        (values.mean() + STRENGTH * reg2).backward()
        return {"reg2": reg2.detach()}

    return step


def opacus(ghost: bool) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    """Opacus's norms for clipping: of a layer's gradients that are made and dropped, or by ghost norms where it has them."""

    def make(model, x, y):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="mean", use_ghost_clipping=ghost)

        def step():
            losses(wrapped, x, y).mean().backward()
            norms = wrapped.get_norm_sample().square()
            mean = sq_norm(p.grad for p in trainable(model).values())
            return {"norms": norms, "variance": norms.mean() - mean}

        return step

    return make


def torchjd(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The Gramian of TorchJD's autogram: its diagonal, and Γ = (tr − mean) of its entries."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)

    def step():
        values = losses(model, x, y)
        gramian = engine.compute_gramian(values)
        values.mean().backward()
        return {"norms": gramian.diagonal(), "variance": gramian.diagonal().mean() - gramian.mean()}

    return step


def backpack(quantity: str) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    """BackPACK's BatchL2Grad, its Variance, and Variance differentiated as its example_gradient_of_variance does."""

    def make(model, x, y):
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad, Variance

        # Its converter makes modules of functions; what is a chain of modules already needs none.
        extended = extend(model, use_converter=not isinstance(model, nn.Sequential) or "Residual" in str(model))
        scale = len(x) ** 2  # its rows are those of the mean loss

        def step():
            with backpack(BatchL2Grad() if quantity == "norms" else Variance()):
                losses(extended, x, y).mean().backward(create_graph=quantity == "reg1")
            parameters = trainable(extended).values()
            if quantity == "norms":
                return {"norms": scale * sum(p.batch_l2 for p in parameters)}
            gamma = scale * torch.stack([p.variance.sum() for p in parameters]).sum()
            if quantity == "reg1":
                (STRENGTH * gamma).backward()
                for p in parameters:
                    p.grad, p.variance = p.grad.detach(), None  # they hold the graph
            return {quantity: gamma.detach()}

        return step

    return make


WAYS = (
    Way("bootgrad", ("norms", "variance"), bootgrad_statistics),
    Way("bootgrad", ("reg1",), bootgrad_reg1),
    Way("bootgrad", ("reg2",), bootgrad_reg2),
    Way("opacus", ("norms", "variance"), opacus(False)),
    Way("opacus-ghost", ("norms", "variance"), opacus(True)),
    Way("backpack", ("norms",), backpack("norms")),
    Way("backpack", ("variance",), backpack("variance")),
    Way("backpack", ("reg1",), backpack("reg1")),
    Way("torchjd", ("norms", "variance"), torchjd),
    Way("vmap", ("norms", "variance"), vmap_statistics),
    Way("vmap", ("reg1",), vmap_reg1),
    Way("vmap", ("reg2",), vmap_reg2),
    Way("hand", ("reg2",), hand_reg2),
)
PEERS = tuple(dict.fromkeys(way.peer for way in WAYS))
PACKAGES = {"opacus": "opacus", "opacus-ghost": "opacus", "backpack": "backpack-for-pytorch", "torchjd": "torchjd"}
