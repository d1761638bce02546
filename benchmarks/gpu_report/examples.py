"""Random arguments of any op of the schema, looked up by the names of its parameters."""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from bootgrad.ops.schema import SCHEMAS, accumulation_dtype, output_size
from bootgrad.planning import ConvLayer, LinearLayer

from ..traffic import Layer, LookUpLayer, NormLayer

EPSILON = 1e-5
_LAYERS_OWN = ("x", "gy", "u")  # tensors with space


def layers_for(op: str, layers: Collection[Layer]) -> list[Layer]:
    """Those of the layers that an op is made for."""
    if op.startswith("linear_rank1"):
        return [layer for layer in layers if isinstance(layer, LinearLayer) and layer.T == 1]
    kinds = {"linear": LinearLayer, "conv": ConvLayer, "group": NormLayer, "embedding": LookUpLayer}
    kind = kinds.get(op.partition("_")[0])
    return [] if kind is None else [layer for layer in layers if isinstance(layer, kind)]


def optional(op: str) -> list[str]:
    """The tensors that an op may go without."""
    return re.findall(r"Tensor\? (\w+)", SCHEMAS[op])


def takes(op: str, argument: str) -> bool:
    """Whether an op has an argument of this name."""
    return argument in _names(op)


def arguments(
    op: str,
    layer: Layer,
    dtype: torch.dtype,
    device: str = "cpu",
    path: str = "direct",
    absent: Collection[str] = (),
    mask: tuple[bool, bool, bool] = (True, True, True),
    channels_last: bool = False,
    apart: bool = False,
    seed: int = 0,
) -> list[Any]:
    """The op's arguments.

    Args:
        op: a name of the schema.
        layer: the layer's shape.
        dtype: of x and gy.
        device: where random numbers are made.
        path: of ops that have paths.
        absent: optional tensors that are None.
        mask: the results that are wanted, of ops that ask.
        channels_last: whether x and gy are laid out with channels last.
        apart: whether the numbers of all other tensors lie two apart, with NaN between.
        seed: of the random numbers.

    Raises:
        KeyError: an argument that nothing is known of.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = accumulation_dtype(dtype)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=drawn, device=device).to(dtype)

    make = {LinearLayer: _linear, ConvLayer: _conv, NormLayer: _norm, LookUpLayer: _look_ups}[type(layer)]
    values = make(op, layer, random, dtype) | {"path": path, "mask": list(mask), "input_grad": True}
    if channels_last:
        values |= {name: _channels_last(values[name]) for name in _LAYERS_OWN if name in values}
    if apart:
        others = {name: t for name, t in values.items() if isinstance(t, Tensor) and name not in _LAYERS_OWN}
        values |= {name: _apart(t) for name, t in others.items() if t.is_floating_point()}
    values |= dict.fromkeys(absent)
    missing = [name for name in _names(op) if name not in values]
    if missing:
        raise KeyError(f"no example for {', '.join(missing)} of {op}: add it to {__name__}")
    return [values[name] for name in _names(op)]


def moved(arguments: list[Any], device: str) -> list[Any]:
    """The same numbers on a device, with the same strides, which `Tensor.to` keeps of dense tensors only."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a) if isinstance(a, Tensor) else a
        for a in arguments
    ]


def widened(arguments: list[Any]) -> list[Any]:
    """The same numbers in float64 on the CPU, for the oracle; integers as they are."""
    cpu = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in cpu]


def _linear(op: str, layer: LinearLayer, random, dtype) -> dict[str, Any]:
    positions = () if op.startswith("linear_rank1") else (layer.T,)
    x, gy = (random(layer.B, *positions, n, dtype=dtype) for n in (layer.I, layer.O))
    weight = layer.O, layer.I
    return {"x": x, "gy": gy, "center": random(*weight), "v": random(*weight), "w": random(layer.B)}


def _conv(op: str, layer: ConvLayer, random, dtype) -> dict[str, Any]:
    geometry = list(layer.K), list(layer.stride), list(layer.padding), list(layer.dilation)
    x = random(layer.B, layer.C, *layer.S, dtype=dtype)
    gy = random(layer.B, layer.O, *output_size(layer.S, *geometry), dtype=dtype)
    weight = layer.O, layer.C // layer.groups, *layer.K
    names = "kernel_size", "stride", "padding", "dilation"
    return {
        "x": x,
        "gy": gy,
        "center": random(*weight),
        "v": random(*weight),
        "w": random(layer.B),
        **dict(zip(names, geometry, strict=True)),
        "groups": layer.groups,
    }


def _norm(op: str, layer: NormLayer, random, dtype) -> dict[str, Any]:
    x, gy, u = (random(layer.B, layer.C, *layer.S, dtype=dtype) for _ in range(3))
    groups = x.to(accumulation_dtype(dtype)).reshape(layer.B, layer.G, -1)
    rows = {name: random(layer.B, layer.C) for name in ("a", "b")}
    rstd = (groups.var(2, correction=0) + EPSILON).rsqrt()
    return {"x": x, "gy": gy, "u": u, **rows, "weight": random(layer.C), "mean": groups.mean(2), "rstd": rstd}


def _look_ups(op: str, layer: LookUpLayer, random, dtype) -> dict[str, Any]:
    """Tokens of which some are looked up often, and some are none."""
    gy = random(layer.B * layer.T, layer.D, dtype=dtype)
    drawn = random(layer.B * layer.T).abs()
    tokens = (
        ((drawn / drawn.max()) ** 2 * (layer.V + 1)).long().clamp(max=layer.V) - 1 if drawn.numel() else drawn.long()
    )
    bounds = torch.arange(layer.B + 1, device=gy.device) * layer.T
    return {"tokens": tokens, "bounds": bounds, "gy": gy, "center": random(layer.V, layer.D)}


def _channels_last(t: Tensor) -> Tensor:
    """The same numbers with stride 1 along dimension 1."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _apart(t: Tensor) -> Tensor:
    """The same numbers with stride 2 along the last dimension."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


def _names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.bootgrad, op).default._schema.arguments]


def positions(layer: Layer) -> int:
    """T of a layer."""
    return math.prod(layer.S) if isinstance(layer, NormLayer) else layer.T
