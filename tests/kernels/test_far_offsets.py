"""Weights whose rows lie more than 2³¹ numbers apart: in sparse files, by the one program that reaches far, interpreted."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from .interpreter import run_interpreted
from .loading import load_kernel

direct, products, configs, index = (
    load_kernel(stem) for stem in ("conv_direct", "conv_products", "conv_configs", "conv_index")
)
SEEN = 16  # numbers of a row that are looked at; the others are holes in the file
# O, R: blocks of rows within 2³¹ numbers, but not all blocks; and single blocks beyond.
MANY_BLOCKS, LONG_ROWS = (130, 2**24 - 128), (64, 2**25 + 2**22)


class OneProgram:
    """A kernel whose launches run the first program alone."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(1, 1)]


def _main(folder):
    direct.conv_rows_kernel = OneProgram(direct.conv_rows_kernel)
    products.conv_output_kernel = OneProgram(products.conv_output_kernel)
    products.conv_input_kernel = OneProgram(products.conv_input_kernel)
    products.row_blocks = lambda *arguments: 1
    layer = load_kernel("layer").Layer()
    errors = {}
    for O, R in (MANY_BLOCKS, LONG_ROWS):  # noqa: E741
        generator = torch.Generator().manual_seed(0)
        far = torch.from_file(str(folder / f"{R}.bin"), shared=True, size=O * R, dtype=torch.half).view(O, R)
        few = far[:, :SEEN].copy_(torch.randn(O, SEEN, generator=generator)).float()
        gy = torch.randn(1, O, 1, 1, 1, generator=generator).half()
        x = torch.ones(1, 1, 1, 1, 1, dtype=torch.half).expand(1, R, 1, 1, 1)
        found, expected = torch.zeros(1, R, 1, 1, 1, dtype=torch.half), gy.float().view(1, O) @ few
        products.launch_input(gy, layer, far, found)
        errors["input", R] = (found[0, :SEEN, 0, 0, 0] - expected[0]).norm() / expected.norm()
        if (O, R) == LONG_ROWS:
            found = torch.empty_like(gy)
            products.launch_output(x, gy, layer, far, out=found)
            errors["output", R] = (found.flatten() - few.sum(1)).norm() / few.sum(1).norm()
            direct.launch_rows(x, gy, layer, rows=far[None, None])
            expected = gy.float().view(O, 1).expand(O, SEEN)
            errors["rows", R] = (far[:, :SEEN] - expected).norm() / expected.norm()
    torch.save({key: float(error) for key, error in errors.items()}, folder / "errors.pt")


def test_offsets_of_weights_do_not_overflow(tmp_path):
    run_interpreted("-m", __name__, str(tmp_path))
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    errors = torch.load(tmp_path / "errors.pt")
    assert len(errors) == 4 and max(errors.values()) < 2e-3, errors


def test_no_block_has_more_rows_than_offsets_are_made_for():
    tables = (configs.DIRECT, configs.PRODUCTS)
    assert max(row[2] for table in tables for rows in table.values() for row in rows) <= index.MOST_BLOCK_O
    # The depth of an input's gradient, too, is over O.
    assert max(row[4] for rows in configs.PRODUCTS.values() for row in rows) <= index.MOST_BLOCK_O


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
