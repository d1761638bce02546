"""``record(model, parameters=…)``: norms of some parameters, for the price of these, and the gradients of all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bootgrad
from bootgrad.errors import ArgumentError, ArgumentTypeError

close = torch.testing.assert_close
NORMS = ("1.weight", "1.bias", "5.weight", "5.bias")


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    model = nn.Sequential(*layers, nn.LayerNorm(5), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 1, 4, 4, dtype=torch.float64), torch.arange(7) % 3


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def both(model, x, y, parameters, **options):
    """Statistics of some parameters, of all, and the gradients that each of the passes fills."""
    found = []
    for names in (parameters, None):
        model.zero_grad()
        with bootgrad.record(model, parameters=names) as rec:
            losses = losses_of(model, x, y)
        found += [rec.backward(losses, **options), [p.grad.clone() for p in model.parameters()]]
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum", "weights"])
@pytest.mark.parametrize("parameters", [NORMS, ("6.weight",), ("0.bias", "4.weight")])
def test_statistics_are_those_of_the_watched_and_gradients_of_all(parameters, reduction):
    model, x, y = network()
    weights = torch.linspace(0.1, 2, 7, dtype=torch.float64) if reduction == "weights" else reduction
    some, grads, every, expected = both(model, x, y, parameters, reduction=weights)
    assert list(some.per_parameter) == [name for name, _ in model.named_parameters() if name in parameters]
    for name, moments in some.per_parameter.items():
        close(moments.sq_norms, every.per_parameter[name].sq_norms)
        close(moments.covariance_trace, every.per_parameter[name].covariance_trace)
    close(some.sq_norms, sum(every.per_parameter[name].sq_norms for name in parameters))
    close(grads, expected)


def test_a_batch_of_one_and_checkpointed_parts():
    model, x, y = network()
    some, grads, every, expected = both(model, x[:1], y[:1], NORMS)
    close(some.sq_norms, sum(every.per_parameter[name].sq_norms for name in NORMS))
    close(grads, expected)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    names = [f"inner.{name}" for name in NORMS]
    again, grads, every, expected = both(Checkpointed(), x, y, names)
    close(again.sq_norms, sum(every.per_parameter[name].sq_norms for name in names))
    close(grads, expected)


def test_rows_of_the_matrix_are_those_of_the_watched():
    model, x, y = network()
    with bootgrad.record(model, parameters=NORMS) as rec:
        losses = losses_of(model, x, y)
    rows = rec.per_sample_gradients(losses).materialize()
    assert set(rows) == set(NORMS)
    grads = torch.autograd.grad(losses[2], [model.get_parameter(name) for name in NORMS])
    close([rows[name][2] for name in NORMS], list(grads))


def test_samples_that_are_coupled_behind_the_watched_are_refused():
    model, x, y = network()
    with bootgrad.record(model, parameters=NORMS) as rec:
        z = model(x)
        losses = F.cross_entropy(z - z.mean(0), y, reduction="none")
    with pytest.raises(bootgrad.BootgradError, match="samples are coupled after group_norm"):
        rec.backward(losses)
    assert all(p.grad is None for p in model.parameters())


class Mixed(nn.Module):
    """A layer whose weight is made of two parameters."""

    WAYS = {
        "scaled": lambda a, b: a * b.sum(1, keepdim=True),
        "added": lambda a, b: a + 2 * b,
        "product": lambda a, b: a @ (a.t() @ b),
        "normed": lambda a, b: torch._weight_norm(a, b[:, :1], 0),
        "in place": lambda a, b: (a + b).mul_(b),
    }

    def __init__(self, way):
        super().__init__()
        self.make, self.out = self.WAYS[way], nn.Linear(3, 3)
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.rand(3, 4) + 0.5)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(x, self.make(self.a, self.b))))


@pytest.mark.parametrize("B", [6, 3])  # 3 is the number of rows of the weight, too
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("way", Mixed.WAYS)
def test_weights_made_of_watched_and_unwatched_parameters(way, name, B):
    torch.manual_seed(0)
    model = Mixed(way).double()
    some, grads, every, expected = both(model, torch.randn(B, 4, dtype=torch.float64), torch.arange(B) % 3, [name])
    close(some.sq_norms, every.per_parameter[name].sq_norms)
    close(grads, expected)


def test_names_that_there_are_not():
    model, _, _ = network()
    model[4].requires_grad_(False)
    for names, message in ((["9.weight"], "'9.weight'"), (["4.weight"], "'4.weight'"), ([], "got none")):
        with pytest.raises(ArgumentError, match=message):
            bootgrad.record(model, parameters=names)
    with pytest.raises(ArgumentTypeError, match="put it into a list"):
        bootgrad.record(model, parameters="1.weight")


def test_a_compiled_model_has_the_norms_of_the_watched():
    model, x, y = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    some, grads, every, expected = both(compiled, x, y, NORMS)
    close(some.sq_norms, sum(every.per_parameter[name].sq_norms for name in NORMS))
    close(grads, expected)
