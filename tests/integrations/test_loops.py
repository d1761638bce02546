"""What the loops of all frameworks share, where no framework has to be there for it."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bootgrad.integrations.loops import loop_of

from .plain import batches, classifier, losses_of


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Sequences(nn.Module):
    """A recurrent layer that is not recorded, and a head that is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.head = nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.recurrent(x.view(len(x), 2, 3))[0][:, -1])


def normalized():
    return nn.Sequential(classifier()[:1], nn.BatchNorm1d(8).double(), *classifier()[1:])


@pytest.mark.parametrize(
    ("make", "options"),
    [(normalized, {"batchnorm": "contribution"}), (Sequences, {"layers": ["head"]})],
    ids=["batchnorm", "layers"],
)
def test_all_parts_of_a_step_are_recorded_by_the_monitors_options(one_rank, make, options):
    parts, model = batches([5, 7]), make()
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    loop = loop_of(wrapped, statistics={"every": 1, **options})
    for batch, last in zip(parts, (False, True), strict=True):
        (loop.loss(lambda x, y: losses_of(wrapped, x, y), *batch, last=last) / 2).backward()
        (losses_of(plain, *batch).mean() / 2).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert loop.monitor.step == 1
    assert loop.monitor.last.batch_size == 7


def test_a_loss_that_is_let_go_takes_its_graph_along():
    model, seen = classifier(), []
    loop = loop_of(model, statistics={"every": 1})

    def losses(x, y):
        hidden = model[:2](x)
        seen[:] = [weakref.ref(hidden)]
        return F.cross_entropy(model[2](hidden), y, reduction="none")

    value = loop.loss(losses, *batches([5])[0])
    assert seen[0]() is not None
    del value
    gc.collect()
    assert seen[0]() is None
    loop.loss(losses, *batches([5])[0]).backward()
    assert loop.monitor.step == 1
