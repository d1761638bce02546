"""The slow, obvious versions of everything: the oracle of the tests, never called at run time.

    G_i = ∂/∂W ⟨f(x_i, W), gy_i⟩        by `vmap(grad)`, for one layer f
    g_i = ∂ℓ_i/∂θ                       by `vmap(grad)` or by one backward pass per sample, for a whole model

The B×P numbers are stored and no product is taken apart, so nothing here shares an idea with what it checks. The ops'
oracles have the ops' names and arguments, but no ``path``, and compute in float64. All but ``*_with_grad`` and
``*_backward`` are differentiable to any order.

Letters: ``B`` samples, ``T`` positions, ``I`` in, ``O`` out, ``C`` channels in, ``K`` kernel, ``S`` space, ``P``
parameters. ``geometry`` is stride, padding, dilation and groups, as `torch.nn.functional.conv2d` takes them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def per_sample_gradients(model: nn.Module, loss_fn: Callable[..., Tensor], *batch) -> dict[str, Tensor]:
    """Rows g_i of every parameter that requires grad, by `vmap(grad)`.

    Args:
        model: any module that `vmap` can run.
        loss_fn: ``loss_fn(model, *batch)``, the losses (B,); called with batches of one sample and a stand-in for the
            model.
        batch: tensors with samples in dimension 0; anything else is handed on as it is.

    Returns:
        {name: (B, *shape)}, differentiable by the parameters.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    is_tensor = [isinstance(t, Tensor) for t in batch]

    def loss(parameters, *sample):
        def stand_in(*args, **kwargs):
            return functional_call(model, parameters, args, kwargs)

        sample = [t.unsqueeze(0) if tensor else t for t, tensor in zip(sample, is_tensor, strict=True)]
        return loss_fn(stand_in, *sample).sum()

    return vmap(grad(loss), (None, *(0 if tensor else None for tensor in is_tensor)))(parameters, *batch)


def per_sample_gradients_of(
    losses: Tensor, parameters: Mapping[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """Rows g_i on an existing graph, by one backward pass per loss; for models that `vmap` cannot run.

    Args:
        losses: (B,); their graph is kept.
        parameters: {name: tensor}; where the losses do not depend on one, its rows are zero.
        create_graph: make the rows differentiable.

    Returns:
        {name: (B, *shape)}.
    """
    wanted = list(parameters.values())

    def row(loss):
        return torch.autograd.grad(
            loss, wanted, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    rows = [row(loss) for loss in losses]
    return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*rows, strict=True), strict=True)}


def matrix(rows: Mapping[str, Tensor]) -> Tensor:
    """The matrix G, (B, P), from {name: (B, *shape)}; every quantity below is a function of it."""
    return torch.cat([g.reshape(g.size(0), -1) for g in rows.values()], 1)


def sq_norms(G: Tensor) -> Tensor:
    """‖g_i‖², (B,)."""
    return G.square().sum(1)


def deviation_sq_norms(G: Tensor, center: Tensor | None = None) -> Tensor:
    """‖g_i − c‖², (B,); c (P,), the mean row when absent."""
    return (G - (G.mean(0) if center is None else center)).square().sum(1)


def covariance_trace(G: Tensor, unbiased: bool = False) -> Tensor:
    """Γ = (1/B) Σ_i ‖g_i − ḡ‖², or with 1/(B − 1)."""
    return deviation_sq_norms(G).sum() / (G.size(0) - unbiased)


def minibatch_covariance_trace(G: Tensor) -> Tensor:
    """Γ / B. Source: arXiv 2512.07676, eq. 10."""
    return covariance_trace(G) / G.size(0)


def noise_scale(G: Tensor) -> Tensor:
    """Γ / ‖ḡ‖²."""
    return covariance_trace(G) / G.mean(0).square().sum()


def reg1(G: Tensor, center: Tensor | None = None) -> Tensor:
    """(1/B) Σ_i ‖g_i − c‖²; c (P,), the mean row when absent. Source: arXiv 2512.07676, eq. 11."""
    return deviation_sq_norms(G, center).mean()


def reg2(G: Tensor, center: Tensor) -> Tensor:
    """‖ḡ − c‖², c (P,). Source: arXiv 2512.07676, eq. 12."""
    return (G.mean(0) - center).square().sum()


def jvp(G: Tensor, v: Tensor) -> Tensor:
    """⟨g_i, v⟩, (B,); v (P,)."""
    return (G * v).sum(1)


def weighted_sum(G: Tensor, w: Tensor) -> Tensor:
    """Σ_i w_i g_i, (P,); w (B,)."""
    return (w[:, None] * G).sum(0)


def gram(G: Tensor) -> Tensor:
    """⟨g_i, g_j⟩, (B, B)."""
    return (G[:, None] * G[None]).sum(2)


def linear_rows(x: Tensor, gy: Tensor) -> Tensor:
    """A linear layer's G_i, (B, O, I); x (B, T, I) or (B, I), gy (B, T, O) or (B, O), here and below."""
    return _rows(F.linear, (gy.size(-1), x.size(-1)), x, gy)


def linear_rank1_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """‖G_i‖², (B,)."""
    return sq_norms(linear_rows(x, gy).flatten(1))


def linear_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """‖G_i‖², (B,)."""
    return sq_norms(linear_rows(x, gy).flatten(1))


def linear_deviation_sq_norms(x: Tensor, gy: Tensor, center: Tensor) -> Tensor:
    """‖G_i − center‖², (B,); center (O, I)."""
    return _layer_deviation(linear_rows(x, gy), center)


def linear_jvp(x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨G_i, v⟩, (B,); v (O, I)."""
    return jvp(linear_rows(x, gy).flatten(1), v.double().flatten())


def linear_weighted_sum(x: Tensor, gy: Tensor, w: Tensor | None) -> Tensor:
    """Σ_i w_i G_i, (O, I); w (B,), ones when None."""
    return _layer_sum(linear_rows(x, gy), w)


def linear_statistics(x: Tensor, gy: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² or empty, and the bias's rows (B, O)."""
    return _statistics(linear_rows(x, gy), gy.double().sum(1), center)


def linear_sq_norms_with_grad(
    x: Tensor, gy: Tensor, center: Tensor | None, mask: Sequence[bool] = (True, True, True)
) -> tuple[Tensor, ...]:
    """‖G_i − center‖² with its derivatives by x and gy, and Σ_i G_i; empty where ``mask`` leaves one out."""
    return _with_grad(linear_rows, x, gy, center, mask)


def conv_rows(x: Tensor, gy: Tensor, kernel_size: int | Sequence[int], *geometry, **options) -> Tensor:
    """A convolution's G_i, (B, O, C/groups, *K); x (B, C, *S), gy (B, O, *S'), here and below."""
    n = x.dim() - 2
    convolution = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    kernel = (kernel_size,) * n if isinstance(kernel_size, int) else tuple(kernel_size)
    groups = options.get("groups", geometry[3] if len(geometry) == 4 else 1)

    def layer(x_i, W):
        return convolution(x_i.unsqueeze(0), W, None, *geometry, **options).squeeze(0)

    return _rows(layer, (gy.size(1), x.size(1) // groups, *kernel), x, gy)


def conv_sq_norms(x: Tensor, gy: Tensor, kernel_size: int | Sequence[int], *geometry, **options) -> Tensor:
    """‖G_i‖², (B,)."""
    return sq_norms(conv_rows(x, gy, kernel_size, *geometry, **options).flatten(1))


def conv_deviation_sq_norms(x: Tensor, gy: Tensor, center: Tensor, *geometry, **options) -> Tensor:
    """‖G_i − center‖², (B,); center (O, C/groups, *K)."""
    return _layer_deviation(conv_rows(x, gy, center.shape[2:], *geometry, **options), center)


def conv_jvp(x: Tensor, gy: Tensor, v: Tensor, *geometry, **options) -> Tensor:
    """⟨G_i, v⟩, (B,); v (O, C/groups, *K)."""
    return jvp(conv_rows(x, gy, v.shape[2:], *geometry, **options).flatten(1), v.double().flatten())


def conv_weighted_sum(
    x: Tensor, gy: Tensor, w: Tensor | None, kernel_size: int | Sequence[int], *geometry, **options
) -> Tensor:
    """Σ_i w_i G_i, (O, C/groups, *K); w (B,), ones when None."""
    return _layer_sum(conv_rows(x, gy, kernel_size, *geometry, **options), w)


def conv_statistics(
    x: Tensor, gy: Tensor, center: Tensor | None, kernel_size: int | Sequence[int], *geometry, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² or empty, and the bias's rows (B, O)."""
    rows = conv_rows(x, gy, kernel_size, *geometry, **options)
    return _statistics(rows, gy.double().flatten(2).sum(2), center)


def conv_sq_norms_with_grad(
    x: Tensor,
    gy: Tensor,
    center: Tensor | None,
    kernel_size: int | Sequence[int],
    *geometry,
    mask: Sequence[bool] = (True, True, True),
    **options,
) -> tuple[Tensor, ...]:
    """‖G_i − center‖² with its derivatives by x and gy, and Σ_i G_i; empty where ``mask`` leaves one out."""

    def rows(x, gy):
        return conv_rows(x, gy, kernel_size, *geometry, **options)

    return _with_grad(rows, x, gy, center, mask)


def group_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, input_grad: bool = True
) -> tuple[Tensor, ...]:
    """The gradient by x, empty unless asked for, and those of γ and β for each sample, (B, C); x's mean and rstd (B, G)."""
    weights = x.new_ones(x.shape[:2]) if weight is None else weight.expand(x.shape[:2])
    dx, gamma, beta = _group_norm_grads(gy.double(), x.double(), weights.double(), rstd)
    return dx if input_grad else dx.new_zeros(0), gamma, beta


def group_norm_double_backward(
    u: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    """Derivatives of ⟨u, gx⟩ + Σ a γ' + Σ b β' by gy, by x, and by each sample's γ, where (gx, γ', β') are the above."""
    weights = x.new_ones(x.shape[:2]) if weight is None else weight.expand(x.shape[:2])

    def product(gy, x, weights):
        grads = _group_norm_grads(gy, x, weights, rstd)
        pairs = [(g, c.double()) for g, c in zip(grads, (u, a, b), strict=True) if c is not None]
        return sum((g * c).sum() for g, c in pairs) + 0 * weights.sum()

    return _derivatives(product, gy, x, weights)


def _group_norm_grads(gy: Tensor, x: Tensor, weights: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(weights)
    g, flat, eps = _group_norm_inputs(gy, x, rstd)

    def output(x_i, weight_i, bias_i, gy_i, eps_i):
        return ((weight_i[:, None] * _normalized(x_i, eps_i) + bias_i[:, None]) * gy_i).sum()

    by_x, *rows = vmap(grad(output, (0, 1, 2)))(flat, weights, torch.zeros_like(weights), g, eps)
    return by_x.reshape(x.shape), *rows


def _group_norm_inputs(gy: Tensor, x: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gy and x as (B, C, N), and each group's ε, from what it must have been."""
    gy, x = (t.double().reshape(*t.shape[:2], -1) for t in (gy, x))
    variance = x.detach().reshape(*rstd.shape, -1).var(2, correction=0)
    return gy, x, rstd.double().square().reciprocal() - variance


def _normalized(x: Tensor, eps: Tensor) -> Tensor:
    """Group norm of one sample (C, N), without an affine part."""
    groups = x.reshape(eps.size(0), -1)
    return ((groups - groups.mean(1, True)) / (groups.var(1, correction=0) + eps).sqrt()[:, None]).view_as(x)


def embedding_tables(tokens: Tensor, bounds: Tensor, gy: Tensor, size: int | None = None) -> Tensor:
    """An embedding's E_i, (B, size, D); tokens (N,), none where negative, bounds (B + 1,) and gy (N, D), here and below."""
    if size is None:
        size = max([0, *(t + 1 for t in tokens.tolist())])
    tables = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        used = tokens[begin:end] >= 0
        own, gy_i = tokens[begin:end][used], gy.double()[begin:end][used]

        def product(W, own=own, gy_i=gy_i):
            return (F.embedding(own, W) * gy_i).sum()

        table = gy_i.new_zeros(size, gy.size(1))
        tables.append(grad(product)(table) if gy_i.numel() else table)
    return torch.stack(tables) if tables else gy.double().new_zeros(0, size, gy.size(1))


def embedding_sq_norms(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None) -> Tensor:
    """‖E_i − center‖², (B,); center (V, D), zeros when None."""
    return _layer_deviation(embedding_tables(tokens, bounds, gy, None if center is None else center.size(0)), center)


def embedding_rows(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
    """‖E_i − center‖², and half of its derivative by gy."""
    with torch.enable_grad():
        gy = gy.detach().double().requires_grad_()
        s = embedding_sq_norms(tokens, bounds, gy, center)
        return s.detach(), torch.autograd.grad(s.sum() + 0 * gy.sum(), gy)[0] / 2


def embedding_jvp(tokens: Tensor, bounds: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨E_i, v⟩, (B,); v (V, D)."""
    return jvp(embedding_tables(tokens, bounds, gy, v.size(0)).flatten(1), v.double().flatten())


def embedding_weighted_sum(tokens: Tensor, bounds: Tensor, gy: Tensor, w: Tensor | None, size: int) -> Tensor:
    """Σ_i w_i E_i, (size, D); w (B,), ones when None."""
    return _layer_sum(embedding_tables(tokens, bounds, gy, size), w)


def _derivatives(product: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
        value = torch.stack([0 * t.sum() for t in inputs]).sum()  # empty inputs leave nothing to differentiate
        if inputs[0].numel():
            value = value + product(*inputs)
        return torch.autograd.grad(value, inputs)


def _rows(layer: Callable[[Tensor, Tensor], Tensor], weight_shape: Sequence[int], x: Tensor, gy: Tensor) -> Tensor:
    x, gy = x.double(), gy.double()
    if x.numel() == 0 or gy.numel() == 0:  # neither vmap nor torch's convolutions take empty tensors
        return x.new_zeros(x.size(0), *weight_shape)
    weight = x.new_zeros(weight_shape)  # G_i does not depend on it

    def product(W, x_i, gy_i):
        return (layer(x_i, W) * gy_i).sum()

    return vmap(grad(product), (None, 0, 0))(weight, x, gy)


def _layer_deviation(rows: Tensor, center: Tensor | None) -> Tensor:
    rows = rows if center is None else rows - center.double()
    return sq_norms(rows.flatten(1))


def _layer_sum(rows: Tensor, w: Tensor | None) -> Tensor:
    w = rows.new_ones(rows.size(0)) if w is None else w.double()
    return weighted_sum(rows.flatten(1), w).view(rows.shape[1:])


def _statistics(rows: Tensor, bias_rows: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    deviation = rows.new_zeros(0) if center is None else _layer_deviation(rows, center)
    return _layer_sum(rows, None), _layer_deviation(rows, None), deviation, bias_rows


def _with_grad(rows, x: Tensor, gy: Tensor, center: Tensor | None, mask) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, gy = (t.detach().double().requires_grad_() for t in (x, gy))
        G = rows(x, gy)
        s = _layer_deviation(G, center)
        zero = 0 * (x.sum() + gy.sum())  # an empty layer's s depends on nothing
        grads = torch.autograd.grad(s.sum() + zero, (x, gy))
    results = (*grads, _layer_sum(G.detach(), None))
    return s.detach(), *(g if wanted else g.new_zeros(0) for g, wanted in zip(results, mask, strict=True))
