"""Nothing of a step outlives it, no node, no activation, no byte, from the moment on when the last name for it is gone."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad import recording

from .alive import STEPS, Made, Model, Nodes, batch, losses_of, regularizer, statistics, tensors_in
from .layers import LAYERS
from .oracle import losses_of as losses_of_outputs

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_nothing_of_a_step_is_alive_after_it(no_collector, step, checkpointed):
    torch.manual_seed(0)
    model, (x, y), nodes = Model(checkpointed), batch(), Nodes()

    def function(x, y):
        losses = losses_of(model)(x, y)
        nodes.see(losses)
        return losses

    with Made() as made:
        kept = step(model, function, x, y)
    owned = [x, y, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(nodes.marks) >= 15 and len(made.storages) >= 30
    assert nodes.alive() == set()
    assert made.alive([*owned, *tensors_in(kept)]) == set()


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_alive_whatever_the_layers(no_collector, name):
    torch.manual_seed(0)
    model, inputs, nodes = LAYERS[name].make().double(), [make() for make in LAYERS[name].inputs], Nodes()

    def function():
        losses = losses_of_outputs(model(*inputs))
        nodes.see(losses)
        return losses

    for step in (statistics, regularizer("exact")):
        model.zero_grad()
        with Made() as made:
            kept = step(model, lambda x, y: function(), None, None)
        tensors = [*inputs, *model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        assert nodes.marks and nodes.alive() == set()
        assert made.alive([t for t in tensors if t is not None] + tensors_in(kept)) == set()


def objects():
    gc.collect()
    return len(gc.get_objects())


def count_over_steps(step, steps):
    """Objects that Python knows of, tensors among them, after ten and after all steps of one model."""
    torch.manual_seed(0)
    model, (x, y) = Model(), batch()
    function = losses_of(model)
    counts = []
    for k in range(steps):
        model.zero_grad()
        step(model, function, x, y)
        if k in (9, steps - 1):
            counts.append(objects())
    return counts


@pytest.mark.parametrize("step", STEPS[::3], ids=lambda f: f.__name__)
def test_the_number_of_objects_is_flat(step):
    first, last = count_over_steps(step, 24)
    assert last <= first + 10  # a key of the signature's count now and then


def test_what_is_remembered_of_a_model_goes_with_it_and_is_small():
    """Shapes that change with every batch leave a number each; parameters' names are not kept."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    gc.collect()
    before = len(recording._states)
    first = None
    for n in range(2, 34):
        with bootgrad.record(model) as rec:
            losses = model(torch.randn(n, 4)).sum(1)
        rec.backward(losses)
        if n == 17:
            first = objects()
    assert objects() - first <= 20  # for 16 shapes of 50 layers
    assert len(recording._states) == before + 1
    del model, rec, losses
    gc.collect()
    assert len(recording._states) == before


PROGRAM = """
import gc, resource, sys
import torch
from tests.alive import Model, STEPS, batch, losses_of

torch.set_num_threads(1)
step = next(s for s in STEPS if s.__name__ == sys.argv[1])
model, (x, y) = Model(sys.argv[2] == "checkpointed"), batch()

def state():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize(), len(gc.get_objects())

for k in range(1000):
    model.zero_grad()
    step(model, losses_of(model), x, y)
    if k == 19:
        _, objects = state()
    if k == 499:
        resident, _ = state()
after = state()
print(after[0] - resident, after[1] - objects)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "arguments",
    ["statistics checkpointed", "exact_ema whole", "finite_difference whole", "random_signs whole"],
)
def test_memory_is_flat_over_a_thousand_steps(arguments):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments.split()]
    grown, objects = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(grown) < 2**20  # 8 bytes that are lost for each of the hundreds of tensors of a step are twice that
    assert int(objects) <= 10
