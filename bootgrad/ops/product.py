"""A layer's product and its derivatives, closed under differentiation.

A linear or convolution layer is one trilinear form ⟨gy, W ∗ x⟩. Its three partial derivatives

    output        y  = W ∗ x
    input grad    gx = Wᵀ ∗ gy
    weight grad   Σ_i G_i,   G_i = Σ_t gy_{i,t} ⊗ u_{i,t}

are each other's derivatives, so three `autograd.Function`s cover every order. The per-sample norms ‖G_i − c‖² add two more:
`SqNorms`, which computes value and adjoint in one visit, and `SqNormsGrad`, whose own derivative is a sum of inner products
⟨G_i, G'_i⟩ and left to plain torch. `CovarianceTrace` is their sum about the mean, and `Visited` a penalty of them that is made
when it is differentiated, once.

Letters as in `ops.schema`. A `Product` is immutable and knows the geometry; it holds no tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from ..planning import ConvLayer, LinearLayer
from .schema import accumulation_dtype


class LayerStatistics(NamedTuple):
    """What one visit of (x, gy) yields: Σ G_i, ‖G_i‖² (B,), ‖G_i − c‖² (B,) or None, and Σ_t gy_{i,t} (B, O)."""

    weight_grad: Tensor
    sq_norms: Tensor
    deviation_sq_norms: Tensor | None
    bias_rows: Tensor


class Mask(NamedTuple):
    """What a visit makes beside the norms: derivatives by x and gy, Σ G_i, and whether the bias is visited, too."""

    x_grad: bool
    gy_grad: bool
    total: bool
    bias: bool


class VisitResult(NamedTuple):
    """‖G_i − c‖² (B,), its derivatives, Σ G_i and the bias's rows b_i (B, O), None where they were not asked for."""

    sq_norms: Tensor
    x_grad: Tensor | None
    gy_grad: Tensor | None
    total: Tensor | None
    bias_rows: Tensor | None


class Product(ABC):
    """The products of one kind of layer. ``x`` has samples in dimension 0, ``gy`` the shape of the output."""

    @abstractmethod
    def factor(
        self, x: Tensor, gy: Tensor, weight_shape: torch.Size, batch_size: int
    ) -> tuple["Product", Tensor, Tensor, torch.Size]:
        """(x, gy) of any number of rows as those of ``batch_size`` samples: the product to use, x, gy, its weight's shape."""

    @abstractmethod
    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output, y = W ∗ x + b."""

    @abstractmethod
    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The gradient of ⟨gy, W ∗ x⟩ with respect to x, of which only the shape is read."""

    @abstractmethod
    def weight_grad(self, x: Tensor, gy: Tensor, w: Tensor | None = None) -> Tensor:
        """Σ_i w_i G_i in the accumulation dtype; w (B,) is ones when absent."""

    @abstractmethod
    def bias_grad(self, gy: Tensor) -> Tensor:
        """Σ over samples and positions of gy, (O,); plain torch."""

    @abstractmethod
    def bias_rows(self, gy: Tensor) -> Tensor:
        """The bias's per-sample gradients Σ_t gy_{i,t}, (B, O); plain torch."""

    @abstractmethod
    def statistics(self, x: Tensor, gy: Tensor, center: Tensor | None) -> LayerStatistics:
        """Everything a first-order pass needs, in one visit; not differentiable."""

    @abstractmethod
    def sq_norms(self, x: Tensor, gy: Tensor, center: Tensor | None) -> Tensor:
        """‖G_i − c‖², (B,); not differentiable."""

    @abstractmethod
    def visit(
        self, x: Tensor, gy: Tensor, centers: tuple[Tensor | None, Tensor | None], mask: Mask, scale: float = 1.0
    ) -> VisitResult:
        """‖G_i − c‖² with ``scale`` times its derivatives by x and by gy, and Σ_i G_i, where ``mask`` asks for them.

        Where it asks for the bias, too, of both together: ‖b_i − c_b‖² adds to the norm, b_i = Σ_t gy_{i,t}. ``centers`` are c
        and c_b, None for zeros. Not differentiable.
        """

    def sq_norms_with_grad(
        self, x: Tensor, gy: Tensor, center: Tensor | None, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """`visit` of the weight alone: ‖G_i − c‖², its derivatives by x and by gy, and Σ_i G_i."""
        visited = self.visit(x, gy, (center, None), Mask(*mask, False))
        return visited.sq_norms, visited.x_grad, visited.gy_grad, visited.total

    @abstractmethod
    def jvp(self, x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
        """⟨G_i, v⟩, (B,); not differentiable."""

    @abstractmethod
    def layer(self, x: Tensor, gy: Tensor) -> LinearLayer | ConvLayer:
        """The shape of the layer, for the cost model."""

    @abstractmethod
    def rows(self, x: Tensor, gy: Tensor) -> Tensor:
        """The G_i themselves, (B, *weight shape); plain torch, differentiable to any order."""


def per_sample(factors: Tensor, like: Tensor) -> Tensor:
    """``factors`` (B,) shaped to multiply ``like`` (B, …) row by row, in its dtype."""
    return factors.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


class Output(Function):
    """y = W ∗ x + b."""

    @staticmethod
    def forward(ctx, product, x, weight, bias=None):
        """Compute y."""
        ctx.product = product
        ctx.save_for_backward(x, weight)
        return product.output(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by x, W and b."""
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        gx = input_grad(ctx.product, gy, weight, x) if needs[1] else None
        gw = weight_grad(ctx.product, x, gy, weight.dtype) if needs[2] else None
        gb = ctx.product.bias_grad(gy) if needs[3:] == (True,) else None
        return None, gx, gw, gb


class InputGrad(Function):
    """gx = Wᵀ ∗ gy."""

    @staticmethod
    def forward(ctx, product, gy, weight, x):
        """Compute gx; of x only the shape is read. An empty stand-in would take a hole of its size in the heap."""
        ctx.product = product
        ctx.save_for_backward(gy, weight)
        return product.input_grad(gy, weight, x)

    @staticmethod
    def backward(ctx, h):
        """Differentiate by gy and W; h has the shape of x."""
        gy, weight = ctx.saved_tensors
        dgy = output(ctx.product, h, weight) if ctx.needs_input_grad[1] else None
        dw = weight_grad(ctx.product, h, gy, weight.dtype) if ctx.needs_input_grad[2] else None
        return None, dgy, dw, None


class WeightGrad(Function):
    """Σ_i G_i, cast to ``dtype``; ``value`` is the sum where it is known already."""

    @staticmethod
    def forward(ctx, product, x, gy, dtype, value=None):
        """Compute the sum."""
        ctx.product = product
        ctx.save_for_backward(x, gy)
        return product.weight_grad(x, gy).to(dtype) if value is None else value.clone()

    @staticmethod
    def backward(ctx, v):
        """Differentiate by x and gy; v has the shape of W."""
        x, gy = ctx.saved_tensors
        v = v.to(x.dtype)
        dx = input_grad(ctx.product, gy, v, x) if ctx.needs_input_grad[1] else None
        dgy = output(ctx.product, x, v) if ctx.needs_input_grad[2] else None
        return None, dx, dgy, None, None


def _by_node() -> bool:
    """Whether something differentiates what is made now, in reverse or forward mode: by ops alone tangents would be lost."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def output(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """W ∗ x; here and below without a node where no graph is made, which takes as long as a small product."""
    return Output.apply(product, x, weight) if _by_node() else product.output(x, weight)


def input_grad(product: Product, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Wᵀ ∗ gy, of which nothing is differentiated by x."""
    return InputGrad.apply(product, gy, weight, x.detach()) if _by_node() else product.input_grad(gy, weight, x)


def weight_grad(product: Product, x: Tensor, gy: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_i G_i, cast to ``dtype``."""
    return WeightGrad.apply(product, x, gy, dtype) if _by_node() else product.weight_grad(x, gy).to(dtype)


def jvp(product: Product, x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨G_i, v⟩, (B,); differentiable to any order."""
    if torch.is_grad_enabled() and (x.requires_grad or gy.requires_grad or v.requires_grad):
        y = Output.apply(product, x, v.to(x.dtype))
        return (y * gy).flatten(1).sum(1, dtype=accumulation_dtype(x.dtype))
    return product.jvp(x, gy, v.to(accumulation_dtype(x.dtype)))


def weighted_sum(product: Product, x: Tensor, gy: Tensor, w: Tensor | None = None) -> Tensor:
    """Σ_i w_i G_i in the accumulation dtype; differentiable to any order."""
    dtype = accumulation_dtype(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or gy.requires_grad or (w is not None and w.requires_grad)):
        return WeightGrad.apply(product, x, gy if w is None else gy * per_sample(w, gy), dtype)
    return product.weight_grad(x, gy, None if w is None else w.to(dtype))


def sq_norms(product: Product, x: Tensor, gy: Tensor, center: Tensor | None = None) -> Tensor:
    """‖G_i − c‖², (B,), c = 0 when absent; differentiable to any order, by the center too."""
    return sq_norms_and_sum(product, x, gy, center, False)[0]


def sq_norms_and_sum(
    product: Product, x: Tensor, gy: Tensor, center: Tensor | None, wanted: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`sq_norms`, and Σ_i G_i as a value without a graph: a by-product of derivatives on the direct path."""
    center = None if center is None else center.to(accumulation_dtype(x.dtype))
    if not torch.is_grad_enabled():
        return product.sq_norms(x, gy, center), None
    return SqNorms.apply(product, x, gy, center, wanted)


class SqNorms(Function):
    """s_i = ‖G_i − c‖²; the adjoint ∂s_i/∂(x_i, gy_i) is made in the same visit and kept."""

    @staticmethod
    def forward(ctx, product, x, gy, center, sum_wanted):
        """Compute s (B,), and Σ_i G_i where it is wanted and comes along."""
        ctx.product, ctx.mask, ctx.kept = product, ctx.needs_input_grad[1:3], None
        ctx.save_for_backward(x, gy, center)
        if not any(ctx.mask):
            return product.sq_norms(x, gy, center), None
        s, *ctx.kept, total = product.sq_norms_with_grad(x, gy, center, (*ctx.mask, sum_wanted))
        if total is not None:
            ctx.mark_non_differentiable(total)
        return s, total

    @staticmethod
    def backward(ctx, alpha, _):
        """Differentiate by x, gy and c: ∂s_i/∂c = 2(c − G_i)."""
        x, gy, center = ctx.saved_tensors
        gx, ggy = _adjoint(ctx, x, gy, center, alpha) if any(ctx.mask) else (None, None)
        gc = 2 * (alpha.sum() * center - weighted_sum(ctx.product, x, gy, alpha)) if ctx.needs_input_grad[3] else None
        return None, gx, ggy, gc, None


class CovarianceTrace(Function):
    """Σ_i ‖G_i − ḡ‖² about the mean ḡ of the rows.

    The mean's own derivative cancels, Σ_i (G_i − ḡ) = 0, so a backward pass costs what it costs about a constant center.
    """

    @staticmethod
    def forward(ctx, product, x, gy, mean):
        """Compute the sum; ``mean`` is ḡ, a value without a graph."""
        ctx.product, ctx.mask = product, ctx.needs_input_grad[1:3]
        s, *ctx.kept, _ = product.sq_norms_with_grad(x, gy, mean, (*ctx.mask, False))
        ctx.save_for_backward(x, gy, mean)
        return s.sum()

    @staticmethod
    def backward(ctx, alpha):
        """Differentiate by x and gy; under create_graph the mean is attached, so that further derivatives are right."""
        x, gy, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean = weighted_sum(ctx.product, x, gy) / x.size(0)
        return None, *_adjoint(ctx, x, gy, mean, alpha.expand(x.size(0))), None


def _adjoint(ctx, x: Tensor, gy: Tensor, center: Tensor | None, alpha: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """α_i times the kept derivatives: in place the first time, which saves a pass over fresh memory, and made again after."""
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        with torch.no_grad():
            _, *kept, _ = ctx.product.sq_norms_with_grad(x, gy, center, (*ctx.mask, False))
    if torch.is_grad_enabled():
        ctx.kept = kept
        return SqNormsGrad.apply(ctx.product, x, gy, center, alpha, *kept)
    dx, dgy = (None if d is None else d.mul_(per_sample(alpha, d)) for d in kept)
    return dx, dgy


class Visit:
    """A layer's share of a penalty, whose derivatives are made when the penalty's backward pass comes to the layer.

    Of a Σ_i ‖G_i − c‖² + b ⟨Σ_i G_i, v⟩, either part where its factor is not zero. `Visited` puts it in the graph as a zero:
    made among the nodes of the pass that made gy, it is differentiated when that pass is, layer by layer, so that x and gy go
    one by one, and of the derivatives by gy one waits at a time.

    Attributes:
        factors: a and b.
        center, direction: make c, None for zero, and v, when the visit is made.
        with_bias: whether the layer's bias is visited, too, as a further part of G_i.
        bias_center, bias_direction: make its parts of c and v.
        sum_wanted: whether Σ_i G_i is to be made along with the norms.
        reads_numbers: whether a tensor's number may be read, for which an accelerator would have to be waited for.
        on_norms: called with this, the parts of c, x and gy after the norms were made.
        sq_norms: ‖G_i − c‖², (B,), after the visit.
        total, bias_total: Σ_i G_i and Σ_i b_i, where they are known.
    """

    def __init__(self, product: Product):
        """A visit of a layer with this product."""
        self.product = product
        self.factors = (0.0, 0.0)
        self.with_bias = self.sum_wanted = self.reads_numbers = False
        self.center = self.direction = self.bias_center = self.bias_direction = _nothing
        self.on_norms: Callable[[Visit, tuple[Tensor | None, ...], Tensor, Tensor], None] | None = None
        self.sq_norms: Tensor | None = None
        self.total: Tensor | None = None
        self.bias_total: Tensor | None = None

    def make(
        self, x: Tensor, gy: Tensor, mask: tuple[bool, bool], scale: Tensor | float = 1.0
    ) -> tuple[Tensor | None, Tensor | None]:
        """``scale`` times the derivatives by x and gy that ``mask`` asks for; the norms come along."""
        dx = dgy = None
        a, b = self.factors
        if a:
            centers = self.center(), self.bias_center()
            # Where it cannot be read, what comes from the graph, about as large as the batch, is put in afterwards.
            number = float(a * scale) if self.reads_numbers else a * x.size(0)
            wanted = Mask(*mask, self.sum_wanted, self.with_bias)
            self.sq_norms, dx, dgy, total, rows = self.product.visit(x, gy, centers, wanted, number)
            if self.sum_wanted:
                self.total, self.bias_total = total, None if rows is None else rows.sum(0)
            if self.on_norms is not None:
                self.on_norms(self, centers, x, gy)
            if not self.reads_numbers:
                dx, dgy = (None if d is None else d.mul_(scale / x.size(0)) for d in (dx, dgy))
        if b and any(mask):
            directions = self.direction(), self.bias_direction()
            v, v_bias = (None if v is None else (v * (b * scale)).to(x.dtype) for v in directions)
            assert v is not None
            dx = _added(dx, self.product.input_grad(gy, v, x)) if mask[0] else None
            dgy = _added(dgy, self.product.output(x, v, v_bias)) if mask[1] else None
        return dx, dgy


def _nothing() -> Tensor | None:
    return None


def _added(t: Tensor | None, more: Tensor) -> Tensor:
    """``more``, added to ``t`` in place where there is one."""
    return more if t is None else t.add_(more)


class Visited(Function):
    """Zero, (), in the place of what a `Visit` differentiates."""

    @staticmethod
    def forward(ctx, visit, x, gy):
        """Keep x and gy until the visit."""
        ctx.visit = visit
        ctx.save_for_backward(x, gy)
        return torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, alpha):
        """Visit the layer."""
        return None, *ctx.visit.make(*ctx.saved_tensors, ctx.needs_input_grad[1:], alpha)


class SqNormsGrad(Function):
    """(α_i ∂s_i/∂x_i, α_i ∂s_i/∂gy_i) for s_i = ‖G_i − c‖², from the derivatives dx, dgy that the forward visit kept."""

    @staticmethod
    def forward(ctx, product, x, gy, center, alpha, dx, dgy):
        """Scale the kept derivatives."""
        ctx.product = product
        ctx.save_for_backward(x, gy, center, alpha)
        ctx.set_materialize_grads(False)
        return tuple(None if d is None else d * per_sample(alpha, d) for d in (dx, dgy))

    @staticmethod
    def backward(ctx, u, v):
        """Differentiate 2 Σ_i α_i ⟨G(u, gy)_i + G(x, v)_i, G(x, gy)_i − c⟩, one layer's rows at a time in memory."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that a path from x to gy outside of this function is not walked here.
            aliases = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            x, gy, center, alpha = aliases
            rows = ctx.product.rows
            tangent = (0 if u is None else rows(u, gy)) + (0 if v is None else rows(x, v))
            deviation = rows(x, gy) if center is None else rows(x, gy) - center.to(x.dtype)
            total = 2 * (alpha.to(x.dtype) * (tangent * deviation).flatten(1).sum(1)).sum()
            wanted = [t for t in aliases if t is not None and t.requires_grad]
            grads = iter(torch.autograd.grad(total, wanted, create_graph=create_graph, allow_unused=True))
        return None, *(next(grads) if t is not None and t.requires_grad else None for t in aliases), None, None
