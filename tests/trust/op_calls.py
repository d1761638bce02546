"""A small call of every op in the schema, by name; which of its arguments' and results' rows belong to which sample.

``B`` samples; no other size is ``B``, so that a result whose leading size is that is one of samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bootgrad.ops import schema

B, C, O, G = 5, 4, 6, 2  # noqa: E741
LENGTHS = (3, 1, 4, 2, 3)  # look-ups of each sample
V, D = 7, 8
NAMES = [
    *schema.SCHEMAS,
    *schema.APPLIED_SCHEMAS,
    *schema.EMBEDDING_SCHEMAS,
    *schema.POOLING_SCHEMAS,
    *schema.RELU_SCHEMAS,
    *schema.CONVOLUTION_SCHEMAS,
    *schema.PARAMETER_SCHEMAS,
    *schema.ATTENTION_SCHEMAS,
]


@dataclass(frozen=True)
class Call:
    """An op's name, its arguments by name, and the names of those whose leading dimension is samples, or look-ups of them."""

    name: str
    values: dict
    rows: tuple[str, ...]

    def run(self, **changes):
        """The op's results, as a tuple."""
        results = getattr(torch.ops.bootgrad, self.name)(*(self.values | changes).values())
        return results if isinstance(results, tuple) else (results,)

    def rows_of(self, sample: int, size: int) -> slice | None:
        """Where in a leading dimension of this size the sample's rows are; None where it is no dimension of samples."""
        if size == B:
            return slice(sample, sample + 1)
        if self.name.startswith("embedding") and size == sum(LENGTHS):
            return slice(sum(LENGTHS[:sample]), sum(LENGTHS[: sample + 1]))
        return None


def argument_names(name: str) -> list[str]:
    """In the schema's order."""
    return [a.name for a in getattr(torch.ops.bootgrad, name).default._schema.arguments]


def dtypes_of(name: str) -> list[torch.dtype]:
    """Those that the op takes: convolutions themselves and their visits are float32's on CPUs, where compiled."""
    if name.startswith(("conv3x3", "conv_output", "conv_input_grad")):
        return [torch.float32]
    return [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def call(name: str, dtype: torch.dtype, path: str = "direct", optional: bool = True, seed: int = 0) -> Call:
    """The op on numbers of the seed; with or without what it may go without."""
    generator = torch.Generator().manual_seed(seed)
    accumulation = schema.accumulation_dtype(dtype)

    def random(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    sums = {"kind": accumulation}
    common = {"path": path, "mask": [True] * 3, "scale": 0.5, "factor": 0.5, "biased": optional}
    if name.startswith("linear"):
        positions = () if "rank1" in name else (3,)
        values = {"x": random(B, *positions, C), "gy": random(B, *positions, O), "w": random(B, **sums)}
        values |= {"center": random(O, C, **sums), "v": random(O, C, **sums)}
    elif name.startswith("conv"):
        size, out = ((7, 8), (7, 8)) if name.startswith("conv3x3") else ((7, 8), (4, 3))
        groups = 1 if name.startswith("conv3x3") else G
        weight = random(O, C // groups, 3, 3, **sums)
        values = {"x": random(B, C, *size), "gy": random(B, O, *out), "w": random(B, **sums), "weight": weight}
        values |= {
            "center": random(*weight.shape, **sums),
            "v": weight,
            "h": random(B, C, *size),
            "bias": random(O, **sums),
        }
        values |= {"g": random(B, O, *out), "shift": random(B, O, **sums), "bias_center": random(O, **sums)}
        values |= {"kernel_size": [3, 3], "stride": [2, 2], "dilation": [1, 2], "groups": groups, "size": [*size]}
        values |= {"padding": [1, 1], "transposed": False}
    elif name.startswith("group_norm"):
        x, z = random(B, C, 3, 2), random(B, C, 3, 2)
        of_groups = x.to(accumulation).view(B, G, -1)
        rstd = (of_groups.var(2, correction=0) + 1e-3).rsqrt()
        values = {
            "gy": random(*x.shape),
            "gz": random(*x.shape),
            "z": z,
            "x": x,
            "u": random(*x.shape),
            "input_grad": True,
        }
        values |= {"a": random(B, C, **sums), "b": random(B, C, **sums), "weight": random(C, **sums)}
        values |= {"mean": of_groups.mean(2), "rstd": rstd}
    elif name.startswith("embedding"):
        bounds, N = torch.tensor([0, *LENGTHS]).cumsum(0), sum(LENGTHS)
        tokens = torch.randint(-1, V, (N,), generator=generator)
        values = {"tokens": tokens, "bounds": bounds, "gy": random(N, D), "center": random(V, D, **sums), "size": V}
        values |= {"v": random(V, D, **sums), "w": random(B, **sums)}
    elif name.startswith("max_pool2d"):
        x = random(B, C, 7, 8)
        _, index = torch.nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
        values = {
            "x": x,
            "kernel_size": [3, 3],
            "stride": [2, 2],
            "padding": [1, 1],
            "dilation": [1, 1],
            "ceil_mode": False,
        }
        values |= {"gy": random(*index.shape), "h": random(*x.shape), "index": index, "size": [7, 8]}
        values |= {"blocked": random(*index.shape) > 0}
    elif name == "sq_distances":
        lists = [random(3, 4), random(6), random(2, 0)], [random(3, 4), random(6), random(2, 0)]
        values = {"a": lists[0], "b": lists[1]}
    else:
        shapes = {"uq": 4, "uk": 7, "uv": 7, "g": 4, "q": 4, "k": 7, "v": 7}
        values = {key: random(B, 2, length, 3) for key, length in shapes.items()}
        values |= {"mask": random(B, 2, 4, 7, **sums), "is_causal": False}
    given = common | values
    chosen = {a: given[a] for a in argument_names(name)}
    if not optional:
        arguments = getattr(torch.ops.bootgrad, name).default._schema.arguments
        left_out = {a.name for a in arguments if str(a.type).startswith("Optional")}
        chosen |= dict.fromkeys(left_out - {"u", "uq"})
    rows = tuple(
        key
        for key, t in chosen.items()
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() and t.size(0) in (B, sum(LENGTHS))
    )
    return Call(name, chosen, rows)
