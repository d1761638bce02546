"""What the device can do at best: a copy within its memory, and large matrix products on random numbers."""

from collections.abc import Iterator
from typing import Any

import torch

from . import timing
from .options import Options


def shards(options: Options) -> list[str]:
    """One process."""
    return ["all"]


def environment(shard: str, options: Options) -> dict[str, str]:
    """Nothing special."""
    return {}


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """Copy, then products by dtype."""
    return [
        ("copy", lambda: copy(options)),
        ("bfloat16", lambda: product("bfloat16", torch.bfloat16, False, options)),
        ("tf32", lambda: product("tf32", torch.float32, True, options)),
        ("float32", lambda: product("float32", torch.float32, False, options)),
    ]


def copy(options: Options) -> Iterator[dict[str, Any]]:
    """Bytes read and written."""
    count = 2**16 if options.tiny else 2**28
    source, target = (torch.randn(count, device=options.device) for _ in range(2))
    time = timing.measure(target.copy_, [[source]], options.device)
    moved = 2 * source.numel() * source.element_size()
    rate = f"{moved / time.median / 1e6:.3f} TB/s"
    yield {"subject": "copy", "status": "ok", "bytes": float(moved), "detail": f"{rate}, {time.how}"} | time.columns()


def product(name: str, dtype: torch.dtype, tf32: bool, options: Options) -> Iterator[dict[str, Any]]:
    """N×N by N×N."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    n = 64 if options.tiny else 8192 if dtype == torch.bfloat16 or tf32 else 4096
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    time = timing.measure(lambda a, b: torch.mm(a, b, out=out), [[a, b]], options.device)
    rate = f"{2 * n**3 / time.median / 1e6:.1f} Tflop/s at {n}³"
    row = {"subject": name, "dtype": str(dtype).removeprefix("torch."), "status": "ok", "operations": 2.0 * n**3}
    yield row | {"detail": f"{rate}, {time.how}"} | time.columns()
