"""What the two linear maps of `conv_products` are for: ⟨G_i, v⟩, the direct path's derivatives, centers of other paths.

    ⟨G_i, v⟩ = ⟨v ∗ x_i, gy_i⟩             never stored: tiles of v ∗ x_i are multiplied with gy's in registers
    ∂s_i/∂gy_i = 2 D_i ∗ x_i               s_i = ‖D_i‖², D_i = G_i − center
    ∂s_i/∂x_i  = 2 D_iᵀ ∗ gy_i

`conv_direct` stores D_i for a chunk of samples, in bfloat16 for bfloat16 and else in float32: as many samples as fit the
caller's budget, which should leave the chunk in L2. B·P numbers never are stored. Operations: three times T·O·R multiply-adds
a sample. Bytes beside x, gy and results: D written once and read once for each derivative and block of positions, from L2.
Letters as in `layer`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .conv_direct import launch_rows, row_tiles, rows_by_segments
from .conv_products import launch_input, launch_output
from .conv_reduce import samples_at_once, segments_of, sum_rows
from .layer import Layer


def jvp(x: Tensor, gy: Tensor, layer: Layer, v: Tensor) -> Tensor:
    """Inner products ⟨G_i, v⟩, (B,) float32; x and gy canonical, v (O, R) float32, contiguous."""
    B = x.size(0)
    if not (x.numel() and gy.numel()):
        return x.new_zeros(B, dtype=torch.float32)
    return sum_rows(launch_output(x, gy, layer, v, dots=True))


def sq_norms_with_grad(
    x: Tensor, gy: Tensor, layer: Layer, workspace_bytes: int, center: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """s_i = ‖G_i − center‖² with its derivatives by x and by gy, and Σ_i G_i, by the direct path.

    Args:
        x: (B, C, S0, S1, S2) of float32, bfloat16 or float16; canonical, any strides.
        gy: (B, O, P0, P1, P2), likewise.
        layer: the geometry.
        workspace_bytes: what may be stored of the G_i at a time.
        center: (O, R) float32, contiguous; zero when absent.
        mask: whether the derivatives by x and by gy, and the sum are wanted; one derivative at least.

    Returns:
        s (B,) float32, ∂s_i/∂x_i and ∂s_i/∂gy_i of `Layer.empty_like`, Σ_i G_i (O, R) float32; None where not wanted.
    """
    B, O = gy.shape[:2]  # noqa: E741
    R = x.size(1) // layer.groups * layer.taps
    dx, dgy = (layer.empty_like(t) if wanted else None for t, wanted in zip((x, gy), mask, strict=False))
    total = x.new_zeros(O, R, dtype=torch.float32) if mask[2] else None
    if not (x.numel() and gy.numel()):
        s = x.new_zeros(B, dtype=torch.float32)
        if center is not None:
            s += center.square().sum()
        return s, *(None if d is None else d.zero_() for d in (dx, dgy)), total
    squares = torch.empty(B, row_tiles(x, gy, layer), dtype=torch.float32, device=x.device)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    segments = segments_of(gy, O * R)
    step = min(B, samples_at_once(O * R, dtype.itemsize + (4 * segments if segments > 1 else 0), workspace_bytes))
    workspace = torch.empty(step, O, R, dtype=dtype, device=x.device)
    launch = launch_rows if segments == 1 else rows_by_segments
    name = "norms" if center is None else "deviation"
    for start in range(0, B, step):
        some = slice(start, start + step)
        xs, gys = x[some], gy[some]
        rows = workspace[: xs.size(0)]
        partial = launch(xs, gys, layer, center=center, rows=rows, total=total is not None, **{name: squares[some]})
        if total is not None:
            total += partial
        if dgy is not None:
            launch_output(xs, gys, layer, rows, out=dgy[some], factor=2.0)
        if dx is not None:
            launch_input(gys, layer, rows, dx[some], factor=2.0)
    return sum_rows(squares), dx, dgy, total


def subtract_center(
    x: Tensor, gy: Tensor, layer: Layer, center: Tensor, s: Tensor, dx: Tensor | None, dgy: Tensor | None
) -> Tensor:
    """Turn ‖G_i‖² and its derivatives, made by another path, into those of ‖G_i − center‖².

        ‖G_i − c‖² = ‖G_i‖² − 2⟨gy_i, c ∗ x_i⟩ + ‖c‖²        never below zero, where rounding would put it

    Args:
        x: canonical.
        gy: canonical.
        layer: the geometry.
        center: (O, R) float32, contiguous.
        s: ‖G_i‖², (B,) float32.
        dx: ∂‖G_i‖²/∂x_i or None, changed in place.
        dgy: ∂‖G_i‖²/∂gy_i or None, changed in place.

    Returns:
        (B,) float32.
    """
    inner = s.new_zeros(())
    if x.numel() and gy.numel():
        inner = sum_rows(launch_output(x, gy, layer, center, dots=True, out=dgy, factor=-2.0, add=True))
        if dx is not None:
            launch_input(gy, layer, center, dx, factor=-2.0, add=True)
    return (s - 2 * inner + center.square().sum()).clamp_(min=0)
