"""Processes that train together, and what each of them finds: cases run one after the other, all in one start of them."""

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(size: int, path, *cases: Callable) -> dict[str, list]:
    """What each case gives on every rank, by its name: its value, or the text of what it raised.

    A case is called with the rank and the number of ranks. It has to be a function of a module.
    """
    with pytest.MonkeyPatch.context() as patch:  # new processes import the cases, and have the path of this one
        patch.syspath_prepend(Path(__file__).parents[2])
        mp.start_processes(_work, (size, str(path), cases), size, start_method="spawn")
    found = [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(size)]
    return {case.__name__: [of_rank[case.__name__] for of_rank in found] for case in cases}


def _work(rank: int, size: int, path: str, cases) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    found = {}
    for case in cases:
        try:
            found[case.__name__] = case(rank, size)
        except Exception:
            found[case.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(found, f"{path}.{rank}")
    dist.destroy_process_group()
