"""Nothing of a step outlives it: no node, no activation, no byte; nor after an exception, once that is let go.

All of it goes when the last name for it does: the cyclic garbage collector is off in these tests.
"""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bootgrad
from bootgrad import recording
from bootgrad.graph import nodes_behind
from bootgrad.rules.checkpointed import saved_tensors_hooks

from .layers import LAYERS
from .oracle import losses_of as losses_of_outputs

B = 6


class Model(nn.Module):
    """Most kinds of layers: products, a norm, a lookup, a repeated token, weights made of others, and one without a rule."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Embedding(5, 6)
        self.linear, self.head = nn.Linear(4 * 16, 6), nn.Linear(6, 3)
        self.scale, self.token = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
        self.mixed = nn.Parameter(torch.randn(6))
        self.checkpointed, self.calls, self.fails_in_run = checkpointed, 0, 0

    def features(self, x):
        self.calls += 1
        if self.calls == self.fails_in_run:
            raise Own
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.linear(x.flatten(1)) * self.scale + self.token.expand(len(x), -1)

    def outputs(self, x):
        x = x + self.table(x.argmax(1) % 5)
        return self.head(torch.cumsum(x.tanh() * self.mixed.softmax(0), 1))

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.outputs, checkpoint(self.features, x, use_reentrant=False), use_reentrant=False)
        return self.outputs(self.features(x))


class Own(Exception):
    pass


class Made(TorchDispatchMode):
    """Weak references to the memory of all tensors that are made, in backward passes, too."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.storages.append((StorageWeakRef(t.untyped_storage()), f"{func} {tuple(t.shape)}"))
        return result

    def alive(self, owned):
        owned = {t.untyped_storage()._cdata for t in owned}
        return {name for reference, name in self.storages if not reference.expired() and reference.cdata not in owned}


class Nodes:
    """Weak references to what hangs at the nodes behind losses, and goes with them."""

    class _Mark:
        pass

    def __init__(self):
        self.marks = []

    def see(self, losses):
        for node in nodes_behind([losses]):
            if node.name() != "torch::autograd::AccumulateGrad":
                node.metadata["mark"] = mark = Nodes._Mark()
                self.marks.append((weakref.ref(mark), node.name()))

    def alive(self):
        return {name for mark, name in self.marks if mark() is not None}


def tensors_in(value):
    """All tensors that an object of ours holds, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        value = list(object.__getattribute__(value, "__dict__").values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


# Steps: functions of a model, of one that makes losses, and of a batch; what they return is kept.


def statistics(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    return rec.backward(losses)


def about_a_center(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    return rec.backward(losses, center={name: torch.ones_like(p) for name, p in model.named_parameters()})


def kept_for_a_second_pass(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    rec.backward(losses, retain_graph=True)
    return rec.backward(losses, retain_graph=True)


def no_backward_pass(model, function, x, y):
    with bootgrad.record(model):
        function(x, y)


def matrix(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    G = rec.per_sample_gradients(losses)
    return G.sq_norms(), G.gram(), G.mean()


def differentiable_matrix(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    (losses.mean() + bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True))).backward()


def micro_batches(model, function, x, y):
    with bootgrad.accumulate(model) as whole:
        for part in zip(x.split(4), y.split(4), strict=True):
            with whole.record():
                losses = function(*part)
            whole.backward(losses)
    return whole.statistics, whole


def regularizer(name, **options):
    """Steps that keep the regularizer with its centers, too."""

    def step(model, function, x, y):
        reg = bootgrad.GradientRegularizer(model, **({"reg1": 0.1, "reg2": 0.2, "center": "zero"} | options))
        return reg.backward(function, x, y), reg.centers

    step.__name__ = name
    return step


def recorded_by_the_regularizer(model, function, x, y):
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    with reg.record():
        losses = function(x, y)
    return reg.backward(losses), reg


def accumulation(name, **options):
    def step(model, function, x, y):
        reg = bootgrad.GradientRegularizer(model, **({"reg1": 0.1, "reg2": 0.2, "center": "zero"} | options))
        with reg.accumulate() as block:
            for part in zip(x.split(4), y.split(4), strict=True):
                reg.backward(function, *part)
        return block, reg

    step.__name__ = name
    return step


FINITE_DIFFERENCES = [
    regularizer("finite_difference", method="finite_difference"),
    regularizer("finite_difference_reg2", method="finite_difference", reg1=0),
    regularizer("random_signs_finite", method="random_signs", derivative="finite_difference", probes=2),
    regularizer("fraction_finite", method="finite_difference", fraction=0.5),
]
STEPS = [
    statistics,
    about_a_center,
    kept_for_a_second_pass,
    no_backward_pass,
    matrix,
    differentiable_matrix,
    micro_batches,
    regularizer("exact"),
    regularizer("exact_batch_mean", reg2=0, center="batch_mean"),
    regularizer("exact_ema", center="ema"),
    regularizer("exact_without_statistics", statistics=False),
    regularizer("exact_fraction", fraction=0.5),
    recorded_by_the_regularizer,
    regularizer("random_signs", method="random_signs"),
    *FINITE_DIFFERENCES,
    accumulation("accumulated"),
    accumulation("accumulated_two_sweeps", center={"reg1": "batch_mean", "reg2": "zero"}),
    accumulation("accumulated_finite", method="finite_difference"),
    accumulation("accumulated_random_signs", method="random_signs"),
]
CHECKPOINTED = pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


def batch():
    return torch.randn(B, 1, 8, 8), torch.randint(0, 3, (B,))


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


@pytest.fixture(scope="module")
def warm():
    """What is imported and cached by the first steps is there."""
    for checkpointed in (False, True):
        model = Model(checkpointed)
        with Made():
            for step in (statistics, STEPS[7], FINITE_DIFFERENCES[0]):
                step(model, losses_of(model), *batch())


@pytest.fixture
def no_collector(warm):
    gc.disable()
    yield
    gc.enable()


@CHECKPOINTED
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
from tests.test_leaks import Model, STEPS, batch, losses_of

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


# Exceptions: where they come from, by name; which of them a step meets depends on what it runs.

ALWAYS = ["forward", "losses", "hook", "shape", "infinite"]
FAILURES = [
    *((step, failure, False) for step in STEPS for failure in ALWAYS),
    *((step, "coupled", False) for step in STEPS if "random_signs" not in step.__name__),
    *((s, f, False) for s in FINITE_DIFFERENCES for f in ("second forward", "second hook", "second shape")),
    *((s, "second hook", True) for s in FINITE_DIFFERENCES),
    *((s, "second run", True) for s in STEPS if s is not no_backward_pass),
]
NOT_MET = {no_backward_pass: {"hook", "shape", "infinite", "coupled"}}


def fail_hook(_):
    raise Own


def failing(model, failure, nodes):
    """A function that makes losses and fails in its own way, in the first call or in the one that repeats it."""
    calls = []

    def function(x, y):
        calls.append(len(x))
        repeats = len(calls) > 1 and calls[-1] == calls[-2]
        now = failure.removeprefix("second ") if failure.startswith("second") == repeats else None
        model.calls, model.fails_in_run = 0, {"forward": 1, "run": 2}.get(now, 2 if failure == "second run" else 0)
        out = model(x)
        if now == "hook":
            out.register_hook(fail_hook)
        if now == "coupled":
            out = out - out.mean(0)
        losses = F.cross_entropy(out, y, reduction="none")
        nodes.see(losses)
        if now == "losses":
            raise Own
        return {"shape": losses[:-1] if repeats else losses.mean(), "infinite": losses / 0}.get(now, losses)

    return function


@pytest.mark.parametrize(
    ("step", "failure", "checkpointed"),
    [f for f in FAILURES if f[1] not in NOT_MET.get(f[0], ())],
    ids=lambda v: getattr(v, "__name__", str(v)).replace(" ", "_"),
)
def test_an_exception_leaves_all_as_it_was(no_collector, step, failure, checkpointed):
    torch.manual_seed(0)
    model, (x, y), nodes = Model(checkpointed), batch(), Nodes()
    untouched = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    raised = False
    with Made() as made:
        try:
            step(model, failing(model, failure, nodes), x, y)
        except (Own, bootgrad.BootgradError):
            raised = True
    assert raised
    assert nodes.alive() == set()
    assert made.alive([x, y, *model.parameters(), *grads]) == set()
    for p, q, grad in zip(model.parameters(), untouched.parameters(), grads, strict=True):
        assert torch.equal(p, q) and p.grad is grad and torch.equal(grad, torch.ones_like(grad))
    assert _get_current_function_mode_stack() == [] and saved_tensors_hooks() is None
    assert torch.is_grad_enabled()
    model.calls = model.fails_in_run = 0
    for m in (model, untouched):
        m.zero_grad()
        torch.manual_seed(1)
        step(m, losses_of(m), x, y)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
