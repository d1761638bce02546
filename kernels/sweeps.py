"""Sums over two lists of parameters to one scalar, in two launches for any number of tensors.

    dot          Σ_k ⟨a_k, b_k⟩
    sq_distance  Σ_k ‖a_k − b_k‖²

Not registered: launchers for the statistics and centers, on lists of tensors. Both read each number once and write one.
Torch has no such sweep: `_foreach_mul` and a sum, or `_foreach_sub` and `_foreach_norm`, write and read a list of products
on the way (4 and 4 passes against 2) and end in one scalar per tensor.

What torch has in one pass is not written again: ``_foreach_add_(c, g, alpha=w)`` is an axpy and ``_foreach_lerp_(c, g, w)``
the update of a moving average, two reads and one write each, in one launch for a few hundred blocks of tensors (their
table of pointers travels as kernel arguments, so long lists take several); ``_foreach_norm`` gives the norm of each tensor
in one pass, and ``torch.stack`` of these with one more norm the whole. A window's update c + w (new − old) is two such
calls, 6 passes; one kernel would take 4, but it is a few percent of a step's traffic and is left to torch.

Numbers are read in the order of memory, so both tensors of a pair must lie alike and without gaps. A table on the device,
made once per pair of lists, tells each program its addresses and how many numbers it has: CHUNK numbers of one pair. The
partial sums are added up by one program in the order of the table, in float64: as many as there are chunks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import accumulation_dtype

CHUNK = 32768
BLOCK = 2048
NUM_WARPS = 8
TOTAL_BLOCK = 1024


class Pairs:
    """Two lists of tensors of the same shapes, and the table of where their numbers are.

    The table keeps the tensors, not their numbers: in-place updates are seen, a tensor that gets other storage is not.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]):
        """Make the table.

        Args:
            a: tensors on one device, without gaps, in any order of dimensions; at least one.
            b: as a, each with the shape and strides of its partner, all of one dtype; it may differ from a's.

        Raises:
            ValueError: a pair whose numbers do not lie alike, more than one dtype in a list, or no tensors.
        """
        self.a, self.b = list(a), list(b)
        if not self.a or len({t.dtype for t in self.a}) > 1 or len({t.dtype for t in self.b}) > 1:
            raise ValueError("a and b must have at least one tensor, and one dtype each: make a table for each dtype")
        rows = []
        for s, t in zip(self.a, self.b, strict=True):
            if not _alike(s, t):
                raise ValueError(
                    f"tensors of a pair must lie alike in memory, without gaps; got strides {s.stride()} and "
                    f"{t.stride()} for shapes {tuple(s.shape)} and {tuple(t.shape)}"
                )
            for start in range(0, s.numel(), CHUNK):
                addresses = (u.data_ptr() + start * u.element_size() for u in (s, t))
                rows.append([*addresses, min(CHUNK, s.numel() - start)])
        # As the caching allocator hands storage out; loads are of 16 bytes then.
        self.aligned = all(address % 16 == 0 for row in rows for address in row[:2])
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(self.a[0].device)


def dot(pairs: Pairs) -> Tensor:
    """Σ_k ⟨a_k, b_k⟩, a scalar of the accumulation dtype of both lists' promoted one."""
    return _sweep(pairs, False)


def sq_distance(pairs: Pairs) -> Tensor:
    """Σ_k ‖a_k − b_k‖², a scalar of the accumulation dtype of both lists' promoted one."""
    return _sweep(pairs, True)


def _sweep(pairs: Pairs, distance: bool) -> Tensor:
    a, b = pairs.a[0], pairs.b[0]
    dtype = accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
    out = torch.empty((), dtype=dtype, device=a.device)
    partials = torch.empty(pairs.table.size(0), dtype=dtype, device=a.device)
    with torch.cuda.device_of(a):
        if partials.numel():
            # The first tensors only tell the kernel what it points to.
            sweep_kernel[(partials.numel(),)](
                a,
                b,
                pairs.table,
                partials,
                DISTANCE=distance,
                ALIGNED=pairs.aligned,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        sweep_total_kernel[(1,)](partials, out, partials.numel(), BLOCK=TOTAL_BLOCK, num_warps=4)
    return out


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.device != b.device:
        return False
    used = [(n, s, t) for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1]
    dense = a.numel() == 0 or 1 + sum((n - 1) * s for n, s, _ in used) == a.numel()
    return dense and all(s == t and s > 0 for _, s, t in used)


@triton.jit
def sweep_kernel(
    a_ptr, b_ptr, table_ptr, partials_ptr, DISTANCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row of the table; each column of the block has a sum of its own, added up once."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    a_at, b_at = tl.load(table_ptr + 3 * pid), tl.load(table_ptr + 3 * pid + 1)
    a_ptr, b_ptr = a_at.to(a_ptr.dtype), b_at.to(b_ptr.dtype)
    if ALIGNED:
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
    N = tl.load(table_ptr + 3 * pid + 2)
    acc = tl.zeros([BLOCK], ACC)
    whole = N // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # a mask that ends anywhere would leave loads of single numbers
        offs = start + tl.arange(0, BLOCK)
        acc += _product(tl.load(a_ptr + offs).to(ACC), tl.load(b_ptr + offs).to(ACC), DISTANCE)
    offs = whole + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < N, other=0.0).to(ACC)
    b = tl.load(b_ptr + offs, mask=offs < N, other=0.0).to(ACC)
    acc += _product(a, b, DISTANCE)
    tl.store(partials_ptr + pid, tl.sum(acc, axis=0))


@triton.jit
def _product(a, b, DISTANCE: tl.constexpr):
    if DISTANCE:
        return (a - b) * (a - b)
    else:
        return a * b


@triton.jit
def sweep_total_kernel(partials_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """The sum of N numbers, by one program."""
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partials_ptr + offs, mask=offs < N, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty))
