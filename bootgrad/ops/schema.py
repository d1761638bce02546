"""Every op of the library, its schema and its meaning, the table of contents; and the checks of what ops are given.

An op is a function of a layer's input ``x`` and of ``gy``, the gradient of the summed losses with respect to the layer's
output. Together they are the layer's per-sample gradients in factored form,

    G_i = Σ_t gy_{i,t} ⊗ u_{i,t}           u = x for a linear layer, the patch of x under the kernel at t for a convolution

Letters: ``B`` samples, ``T`` positions, ``I`` in, ``O`` out, ``C`` channels in, ``K`` kernel positions, ``S`` space.
``x`` and ``gy`` share one floating dtype. Results that are reduced over a sample have the *accumulation* dtype: float32 for
bfloat16 and float16, the input's own otherwise; so have ``center`` and ``v``, the layer-shaped inputs, and layer-shaped sums.

Ops are raw: no autograd, no broadcasting, no choice of path. `ops.linear`, `ops.convolution` and `ops.embedding` add these.
The eager implementations in `ops.backends.eager` are the defaults for every device; compiled ones take over where they are
registered.

``path`` is "direct" (form G_i tile by tile) or "gram" (⟨U Uᵀ, Gy Gyᵀ⟩ over T×T, the "ghost norm" of the literature).
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ArgumentError

NAMESPACE = "bootgrad"
CUDA_NAMESPACE = "bootgrad_cuda"
PATHS = ("direct", "gram")

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"

SCHEMAS = {
    # Linear layers with one position, T = 1: x (B, I), gy (B, O). G_i = gy_i ⊗ x_i has rank one.
    # (B,)  ‖x_i‖² ‖gy_i‖²
    "linear_rank1_sq_norms": "(Tensor x, Tensor gy) -> Tensor",
    # Linear layers: x (B, T, I), gy (B, T, O).
    # (B,)  ‖G_i‖²
    "linear_sq_norms": "(Tensor x, Tensor gy, str path) -> Tensor",
    # (B,)  ‖G_i − center‖²; center (O, I)
    "linear_deviation_sq_norms": "(Tensor x, Tensor gy, Tensor center, str path) -> Tensor",
    # (B,)  ⟨G_i, v⟩; v (O, I)
    "linear_jvp": "(Tensor x, Tensor gy, Tensor v) -> Tensor",
    # (O, I)  Σ_i w_i G_i; w (B,) of the accumulation dtype, ones when absent
    "linear_weighted_sum": "(Tensor x, Tensor gy, Tensor? w) -> Tensor",
    # One visit for a first-order pass: Σ_i G_i (O, I), ‖G_i‖² (B,), ‖G_i − center‖² (B,) or empty (0,) without a center,
    # and the bias's per-sample gradients Σ_t gy_{i,t} (B, O)
    "linear_statistics": "(Tensor x, Tensor gy, Tensor? center, str path) -> (Tensor, Tensor, Tensor, Tensor)",
    # One visit for a second-order pass: s_i = ‖G_i − center‖² (center 0 when absent) with ∂s_i/∂x_i, shaped and typed as x,
    # and ∂s_i/∂gy_i, as gy, and Σ_i G_i (O, I). A derivative or sum that ``mask`` leaves out is empty (0,).
    "linear_sq_norms_with_grad": (
        "(Tensor x, Tensor gy, Tensor? center, str path, bool[3] mask) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # Convolutions: x (B, C, *S), gy (B, O, *S'), weights (O, C/groups, *K); zero padding, the same on both sides.
    "conv_sq_norms": f"(Tensor x, Tensor gy, int[] kernel_size, {_GEOMETRY}, str path) -> Tensor",
    "conv_deviation_sq_norms": f"(Tensor x, Tensor gy, Tensor center, {_GEOMETRY}, str path) -> Tensor",
    "conv_jvp": f"(Tensor x, Tensor gy, Tensor v, {_GEOMETRY}) -> Tensor",
    "conv_weighted_sum": f"(Tensor x, Tensor gy, Tensor? w, int[] kernel_size, {_GEOMETRY}) -> Tensor",
    "conv_statistics": (
        f"(Tensor x, Tensor gy, Tensor? center, int[] kernel_size, {_GEOMETRY}, str path)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "conv_sq_norms_with_grad": (
        f"(Tensor x, Tensor gy, Tensor? center, int[] kernel_size, {_GEOMETRY}, str path, bool[3] mask)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # Group norm: x, gy, u (B, C, …); of the accumulation dtype weight (C,) or absent, mean and rstd (B, G), a, b (B, C).
    # The gradient by x, r P(γ gy), typed as x and empty (0,) unless asked for; those by γ and β for each sample, (B, C)
    "group_norm_backward": (
        "(Tensor gy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool input_grad) -> (Tensor, Tensor, Tensor)"
    ),
    # The adjoint of that for cotangents u, a, b of its results, absent where zero: by gy, by x, and by γ for each sample
    "group_norm_double_backward": (
        "(Tensor? u, Tensor? a, Tensor? b, Tensor gy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    # Embeddings: E_i = Σ_n onehot(tokens_n) ⊗ gy_n over sample i's look-ups, n from bounds_i to bounds_{i+1} − 1; tokens (N,)
    # int64, negative where there is none; bounds (B + 1,) int64, from 0 to N; gy (N, D)
    # (B,)  ‖E_i − center‖²; center (V, D), zeros when absent
    "embedding_sq_norms": "(Tensor tokens, Tensor bounds, Tensor gy, Tensor? center) -> Tensor",
}

# Ops that GPUs run in plain torch: another input h, as x, or g, as gy, times the G_i.
# (B, O, *S')  G_i ∗ h_i, as the convolution puts out, in the dtype of h
# (B, C, *S)  G_iᵀ ∗ g_i, as the gradient of its input
APPLIED_SCHEMAS = {
    "conv_applied": f"(Tensor x, Tensor gy, Tensor h, int[] kernel_size, {_GEOMETRY}, str path) -> Tensor",
    "conv_applied_transposed": f"(Tensor x, Tensor gy, Tensor g, int[] kernel_size, {_GEOMETRY}, str path) -> Tensor",
    # The same with weight + factor·G_i in the place of G_i, by tiles; weight (O, C/groups, *K) and shift (B, O), which is added
    # at every position, of the accumulation dtype. x and gy have elements.
    "conv_displaced": f"(Tensor x, Tensor gy, Tensor h, Tensor weight, Tensor? shift, float factor, {_GEOMETRY}) -> Tensor",
    "conv_displaced_transposed": f"(Tensor x, Tensor gy, Tensor g, Tensor weight, float factor, {_GEOMETRY}) -> Tensor",
}

# What else there is of embeddings, in plain torch on GPUs.
EMBEDDING_SCHEMAS = {
    # ‖E_i − center‖², and for each look-up its token's row of E_i − center, (N, D), typed as gy; zeros where there is no token
    "embedding_rows": "(Tensor tokens, Tensor bounds, Tensor gy, Tensor? center) -> (Tensor, Tensor)",
    # (B,)  ⟨E_i, v⟩; v (V, D)
    "embedding_jvp": "(Tensor tokens, Tensor bounds, Tensor gy, Tensor v) -> Tensor",
    # (V, D)  Σ_i w_i E_i, for V = size; w (B,) of the accumulation dtype, ones when absent
    "embedding_weighted_sum": "(Tensor tokens, Tensor bounds, Tensor gy, Tensor? w, int size) -> Tensor",
}

# Activations, plain torch on GPUs, too.
POOLING_SCHEMAS = {
    # Maxima (B, C, *P) of the windows of x (B, C, H, W), and where each is in its plane, int64; as torch's op with indices
    "max_pool2d": (
        "(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> (Tensor, Tensor)"
    ),
    # (B, C, *size)  gy added up where the maxima were, and (B, C, *P), its adjoint: h there. Nothing passes where a maximum is
    # ``blocked``, (B, C, *P) of bool or absent, as it is where a ReLU before the pooling has no slope.
    "max_pool2d_backward": "(Tensor gy, Tensor index, Tensor? blocked, int[] size) -> Tensor",
    "max_pool2d_gather": "(Tensor h, Tensor index, Tensor? blocked) -> Tensor",
}

# The same of a ReLU behind a group norm, z = max(0, y): gz takes the place of gy, and only where z > 0 does it count, or is
# differentiated by. In plain torch on GPUs what is between.
RELU_SCHEMAS = {
    "group_norm_relu_backward": (
        "(Tensor gz, Tensor z, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool input_grad)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "group_norm_relu_double_backward": (
        "(Tensor? u, Tensor? a, Tensor? b, Tensor gz, Tensor z, Tensor x, Tensor? weight, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

# Convolutions themselves: in float32 on CPUs; in any dtype in plain torch, as on GPUs. Beside them what a step on a CPU saves a
# sweep over activations by.
CONVOLUTION_SCHEMAS = {
    # Of x (B, C, *S) with weight (O, C/groups, *K); and the gradient of its input, of spatial ``size`` S
    "conv_output": f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    "conv_input_grad": f"(Tensor gy, Tensor weight, int[] size, {_GEOMETRY}) -> Tensor",
    # ``conv_sq_norms_with_grad`` with both derivatives multiplied by ``scale``; where ``biased``, of weight and bias together:
    # ‖b_i − bias_center‖², zeros when absent, adds to s_i, and its derivative to that by gy. Last b_i = Σ_t gy_{i,t}, (B, O) of
    # the accumulation dtype, else (0, O)
    "conv_visit": (
        f"(Tensor x, Tensor gy, Tensor? center, bool biased, Tensor? bias_center, int[] kernel_size, {_GEOMETRY}, str path,"
        " bool[3] mask, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # Of x (B, C, H, W) with a 3×3 kernel, (O, C, 3, 3), with stride 1; transposed, with the kernel (C, O, 3, 3) turned around:
    # the gradient of the input of a convolution whose padding was 2 less this one's
    "conv3x3": "(Tensor x, Tensor weight, Tensor? bias, int[] padding, bool transposed) -> Tensor",
    # Σ_i w_i G_i of such a convolution, (O, C, 3, 3) in the accumulation dtype; w (B,) is ones when absent
    "conv3x3_weighted_sum": "(Tensor x, Tensor gy, Tensor? w, int[] padding) -> Tensor",
}

# Tensors shaped as parameters, in plain torch on GPUs.
PARAMETER_SCHEMAS = {
    # (n,) float64  ‖scale·a_k − b_k‖² of n pairs of one dtype; b is empty for zeros
    "sq_distances": "(Tensor[] a, Tensor[] b, float scale) -> Tensor",
}

# Attention, in plain torch on GPUs.
ATTENTION_SCHEMAS = {
    # For q (N, H, L, D), k (N, H, S, D), v (N, H, S, D'), g = gO (N, H, L, D'), u as q, k and v or absent: derivatives of
    # ⟨u_Q, gQ⟩ + ⟨u_K, gK⟩ + ⟨u_V, gV⟩ by g, q, k and v, in their dtype, laid out as (N, ·, H, ·). To the scores is added mask
    # (N, H, L, S), of the accumulation dtype
    "attention_double_backward": (
        "(Tensor? uq, Tensor? uk, Tensor? uv, Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal,"
        " float scale) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}

library = torch.library.Library(NAMESPACE, "DEF")
# The same ops as the compiled library for GPUs implements them, which may be some: `backends.gpu` calls them. They are no
# part of a graph, so they have no fakes.
cuda_library = torch.library.Library(CUDA_NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    cuda_library.define(_name + _schema)
for _name, _schema in (
    APPLIED_SCHEMAS
    | EMBEDDING_SCHEMAS
    | POOLING_SCHEMAS
    | RELU_SCHEMAS
    | CONVOLUTION_SCHEMAS
    | PARAMETER_SCHEMAS
    | ATTENTION_SCHEMAS
).items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of ``dtype`` are kept: float32 for half precisions, else ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Spatial size of a convolution's output: ⌊(S + 2·padding − dilation·(K − 1) − 1)/stride⌋ + 1 per dimension."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, k, st, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def check_paths(path: str) -> None:
    """Raise unless ``path`` names one of the ways to a norm."""
    torch._check(path in PATHS, lambda: f"path must be one of {', '.join(PATHS)}; got {path!r}")


def check_pair(x: Tensor, gy: Tensor) -> None:
    """Raise unless ``x`` and ``gy`` can be a layer's input and output gradient: one dtype, device and batch size."""
    torch._check(x.is_floating_point(), lambda: f"x must be a floating-point tensor; got {x.dtype}")
    torch._check(x.dtype == gy.dtype, lambda: f"x and gy must have one dtype; got {x.dtype} and {gy.dtype}")
    torch._check(x.device == gy.device, lambda: f"x and gy must be on one device; got {x.device} and {gy.device}")
    torch._check(
        x.size(0) == gy.size(0), lambda: f"x and gy must have one batch size; got {x.size(0)} and {gy.size(0)}"
    )


@contextmanager
def argument_errors():
    """Report failing checks as errors of the caller's arguments."""
    try:
        yield
    except RuntimeError as error:
        raise ArgumentError(str(error)) from None


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    """Raise unless ``tensor`` (or None) has ``shape``."""
    if tensor is None:
        return
    torch._check(
        list(tensor.shape) == list(shape),
        lambda: f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}",
    )


def check_layer(name: str, tensor: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    """Raise unless ``tensor`` (or None) has ``shape``, the accumulation dtype of ``x``, and its device."""
    check_shape(name, tensor, shape)
    if tensor is None:
        return
    dtype = accumulation_dtype(x.dtype)
    torch._check(tensor.dtype == dtype, lambda: f"{name} must have dtype {dtype}; got {tensor.dtype}")
    check_device(name, tensor, x)


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless ``tensor`` is where ``x`` is."""
    torch._check(
        tensor.device == x.device,
        lambda: f"{name} must be on {x.device}, where x is; got {tensor.device}: move it there by .to()",
    )


def check_linear(x: Tensor, gy: Tensor) -> None:
    """Raise unless ``x`` is (B, T, I) and ``gy`` (B, T, O)."""
    torch._check(
        x.dim() == 3 and gy.dim() == 3, lambda: f"x and gy must be (B, T, ·); got {x.dim()} and {gy.dim()} dims"
    )
    check_pair(x, gy)
    torch._check(x.size(1) == gy.size(1), lambda: f"x and gy must share T; got {x.size(1)} and {gy.size(1)}")


def check_conv(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise unless ``gy`` is the shape that a convolution of ``x`` with this geometry puts out."""
    n = x.dim() - 2
    torch._check(n >= 1, lambda: f"x must be (B, C, *S); got shape {tuple(x.shape)}")
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding), ("dilation", dilation)):
        message = f"{name} must have {n} numbers, one per dimension; got {list(value)}"
        torch._check(len(value) == n, lambda message=message: message)
    check_pair(x, gy)
    torch._check(
        groups >= 1 and x.size(1) % groups == 0 and gy.size(1) % groups == 0,
        lambda: f"groups must divide the channels; got {groups} for {x.size(1)} in and {gy.size(1)} out",
    )
    expected = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    torch._check(
        list(gy.shape[2:]) == expected,
        lambda: f"gy must have spatial size {tuple(expected)} for this x and geometry; got {tuple(gy.shape[2:])}",
    )


def weight_shape(x: Tensor, gy: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, ...]:
    """Shape (O, C/groups, *K) of the weights of a convolution."""
    return (gy.size(1), x.size(1) // groups, *kernel_size)


def check_embedding(tokens: Tensor, bounds: Tensor, gy: Tensor) -> None:
    """Raise unless ``tokens`` are (N,), ``bounds`` (B + 1,), and ``gy`` (N, D)."""
    torch._check(
        gy.dim() == 2 and gy.is_floating_point(),
        lambda: f"gy must be floating point, (N, D); got {gy.dtype} of shape {tuple(gy.shape)}",
    )
    for name, t in (("tokens", tokens), ("bounds", bounds)):
        torch._check(
            t.dim() == 1 and t.dtype == torch.int64,
            lambda name=name, t=t: f"{name} must be int64 in one dimension; got {t.dtype} of shape {tuple(t.shape)}",
        )
        torch._check(
            t.device == gy.device,
            lambda name=name, t=t: (
                f"{name} must be on {gy.device}, where gy is; got {t.device}: move it there by .to()"
            ),
        )
    torch._check(
        tokens.size(0) == gy.size(0),
        lambda: f"tokens and gy must have one length; got {tokens.size(0)} and {gy.size(0)}",
    )
    torch._check(bounds.size(0) > 0, lambda: "bounds must have a number more than there are samples; got none")


def check_table(name: str, tensor: Tensor | None, gy: Tensor) -> None:
    """Raise unless ``tensor`` (or None) is a table (V, D), of the accumulation dtype of ``gy`` (N, D), and where that is."""
    if tensor is None:
        return
    torch._check(
        tensor.dim() == 2 and tensor.size(1) == gy.size(1),
        lambda: f"{name} must have shape (V, {gy.size(1)}); got {tuple(tensor.shape)}",
    )
    check_layer(name, tensor, tensor.shape, gy)


def check_applied(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless another input has the shape and the dtype of x, or of gy."""
    check_shape(name, tensor, like.shape)
    torch._check(tensor.dtype == like.dtype, lambda: f"{name} must have the dtype of x and gy")


def check_displaced(x: Tensor, gy: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> None:
    """Raise unless weight, x and gy are those of one convolution."""
    torch._check(
        weight.dim() == x.dim(), lambda: f"weight must have {x.dim()} dimensions, as x; got shape {tuple(weight.shape)}"
    )
    kernel_size = weight.shape[2:]
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    check_layer("weight", weight, weight_shape(x, gy, kernel_size, groups), x)


def check_group_norm(x: Tensor, others: dict[str, Tensor], weight: Tensor | None, mean: Tensor, rstd: Tensor) -> None:
    """Raise unless ``others`` are as ``x`` (B, C, …), ``weight`` (C,), and mean and rstd (B, G) with G a divisor of C."""
    torch._check(x.dim() >= 2 and x.is_floating_point(), lambda: f"x must be floating point, (B, C, …); got {x.shape}")
    for name, t in others.items():
        torch._check(
            t.shape == x.shape and t.dtype == x.dtype,
            lambda name=name, t=t: (
                f"{name} must be {x.dtype} of shape {tuple(x.shape)}; got {t.dtype}, {tuple(t.shape)}"
            ),
        )
        check_device(name, t, x)
    torch._check(
        mean.dim() == 2
        and mean.shape == rstd.shape
        and mean.size(0) == x.size(0)
        and x.size(1) % max(1, mean.size(1)) == 0,
        lambda: (
            f"mean and rstd must be (B, G), G a divisor of {x.size(1)}; got {tuple(mean.shape)} and {tuple(rstd.shape)}"
        ),
    )
    check_layer("weight", weight, x.shape[1:2], x)
    check_layer("mean", mean, mean.shape, x)
    check_layer("rstd", rstd, mean.shape, x)


def check_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, padding, transposed: bool) -> None:
    """Raise unless the inputs of ``conv3x3`` fit together."""
    torch._check(x.dim() == 4, lambda: f"x must be (B, C, H, W); got shape {tuple(x.shape)}")
    torch._check(
        weight.dim() == 4 and weight.shape[2:] == (3, 3) and weight.size(0 if transposed else 1) == x.size(1),
        lambda: f"weight must be a 3×3 kernel for {x.size(1)} channels; got shape {tuple(weight.shape)}",
    )
    torch._check(
        len(padding) == 2 and all(0 <= p and s + 2 * p >= 3 for s, p in zip(x.shape[2:], padding, strict=False)),
        lambda: f"padding must be two numbers with which x is as large as the kernel; got {padding}",
    )
    check_shape("bias", bias, (weight.size(1 if transposed else 0),))
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None:
            torch._check(t.dtype == x.dtype, lambda name=name, t=t: f"{name} must have dtype {x.dtype}; got {t.dtype}")
            check_device(name, t, x)


def check_bias_center(x: Tensor, gy: Tensor, biased: bool, bias_center: Tensor | None) -> None:
    """Raise unless the center's part for the bias, (O,), is there only where the bias is visited, too."""
    torch._check(
        biased or bias_center is None,
        lambda: "bias_center is for a layer whose bias is visited, too: biased must be true",
    )
    check_layer("bias_center", bias_center, gy.shape[1:2], x)


def check_product(x: Tensor, gy: Tensor, weight: Tensor, stride, padding, dilation, groups) -> None:
    """Raise unless x, gy and weight are those of one convolution."""
    torch._check(
        weight.dim() == x.dim(), lambda: f"weight must have {x.dim()} dimensions, as x; got shape {tuple(weight.shape)}"
    )
    kernel_size = weight.shape[2:]
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    check_shape("weight", weight, weight_shape(x, gy, kernel_size, groups))
    torch._check(weight.dtype == x.dtype, lambda: f"weight must have dtype {x.dtype}; got {weight.dtype}")
    check_device("weight", weight, x)


def check_pairs(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Raise unless there are tensors of one dtype, and as many of the same shapes in ``b``, or none."""
    torch._check(len(a) > 0, lambda: "sq_distances needs at least one tensor")
    torch._check(len(b) in (0, len(a)), lambda: f"a and b must have as many tensors; got {len(a)} and {len(b)}")
    for s, t in zip(a, b or a, strict=True):
        torch._check(
            s.shape == t.shape and s.dtype == t.dtype == a[0].dtype,
            lambda s=s, t=t: (
                "a and b must have one dtype, and their tensors shapes in pairs; "
                f"got {tuple(s.shape)} and {tuple(t.shape)}"
            ),
        )


def check_attention(
    uq: Tensor | None,
    uk: Tensor | None,
    uv: Tensor | None,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> None:
    """Raise unless these are the inputs of one attention, its output's gradient, and cotangents of its inputs' gradients."""
    for name, t in {"g": g, "q": q, "k": k, "v": v}.items():
        torch._check(
            t.dim() == 4 and t.is_floating_point(),
            lambda name=name, t=t: (
                f"{name} must be floating point, (N, H, ·, ·); got {t.dtype} of shape {tuple(t.shape)}"
            ),
        )
    (N, H, L, D), S, values = q.shape, k.size(2), v.size(3)
    keys, of_values = (N, H, S, D), (N, H, S, values)
    expected = {
        "g": (g, (N, H, L, values)),
        "k": (k, keys),
        "v": (v, of_values),
        "uq": (uq, q.shape),
        "uk": (uk, keys),
        "uv": (uv, of_values),
    }
    for name, (tensor, shape) in expected.items():
        check_shape(name, tensor, shape)
        if tensor is not None:
            torch._check(
                tensor.dtype == q.dtype,
                lambda name=name, tensor=tensor: f"{name} must have the dtype of q, {q.dtype}; got {tensor.dtype}",
            )
            check_device(name, tensor, q)
    check_layer("mask", mask, (N, H, L, S), q)
