"""What tests of compiled models share: a compiler without a past, and steps that are compared with the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import bootgrad
from bootgrad import reference
from bootgrad.compiled import CompiledOperation

# What torch warns of by itself: torch.jit where its compiler is imported, inputs' gradients, "same" padding that it copies for.
IGNORED = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_calls(rec):
    """Of the recorded operations, whether each is a compiled function."""
    return [isinstance(o, CompiledOperation) for o in rec.operations]


def oracle(losses, model):
    """(B, P), one backward pass per sample."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = reference.per_sample_gradients_of(losses, parameters)
    return torch.cat([g.reshape(len(losses), -1) for g in rows.values()], 1)


def check_step(model, losses_of, compiled, *batch, tolerance=1e-10):
    """Statistics and gradients of a compiled step against the oracle on the model as it was written; `compiled_calls`."""
    torch.manual_seed(0)
    G = oracle(losses_of(*batch), model)
    model.zero_grad()
    torch.manual_seed(0)
    with bootgrad.record(model) as rec:
        losses = compiled(*batch)
    calls = compiled_calls(rec)
    statistics = rec.backward(losses)
    flat = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(statistics.sq_norms, reference.sq_norms(G).to(statistics.sq_norms.dtype), **close)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in flat]), G.mean(0), **close)
    torch.testing.assert_close(
        statistics.covariance_trace,
        reference.covariance_trace(G).to(losses.dtype),
        rtol=100 * tolerance,
        atol=tolerance,
    )
    return calls


def cross_entropy(model):
    """Losses (B,) of inputs and labels."""
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")
