"""The table of contents is complete: every op has an eager implementation, a fake and an oracle of its name."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bootgrad import reference
from bootgrad.ops import schema
from bootgrad.ops.backends import eager

from . import test_embedding, test_group_norm
from .cases import arguments, conv_case, linear_case, takes

EVERY_OP = pytest.mark.parametrize("name", schema.SCHEMAS)


def small(name):
    """An op's arguments for a small layer, by name."""
    if name.startswith("group_norm"):
        values = test_group_norm.arguments(name, (2, 4, 3), 2, torch.float32)
    elif name.startswith("embedding"):
        values = test_embedding.arguments(name, (3, 0, 2), 4, 5, torch.float32)
    elif name == "linear_rank1_sq_norms":
        case = linear_case(2, 1, 3, 4, torch.float32)
        values = arguments(name, case.but(x=case.x[:, 0], gy=case.gy[:, 0]))
    elif name.startswith("linear"):
        values = arguments(name, linear_case(2, 5, 3, 4, torch.float32))
    else:
        values = arguments(name, conv_case(2, 3, (5,), 4, (2,), (1,), (0,), (1,), 1, torch.float32))
    return dict(zip(argument_names(name), values, strict=True))


def argument_names(name):
    return [a.name for a in getattr(torch.ops.bootgrad, name).default._schema.arguments]


@EVERY_OP
def test_eager_has_the_schema_s_arguments(name):
    assert list(inspect.signature(getattr(eager, name)).parameters) == argument_names(name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bootgrad::{name}", "CompositeExplicitAutograd")


@EVERY_OP
def test_the_dispatcher_finds_an_implementation(name):
    ours = getattr(torch.ops.bootgrad, name)(*small(name).values())
    torch.testing.assert_close(ours, getattr(eager, name)(*small(name).values()))


@EVERY_OP
def test_reference_has_the_name_and_arguments(name):
    parameters = inspect.signature(getattr(reference, name)).parameters
    own = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # Stride, padding, dilation and groups are handed on to torch, which has its own names for and checks of them.
    assert own == [n for n in argument_names(name) if n not in {"stride", "padding", "dilation", "groups", "path"}]


@EVERY_OP
def test_fakes_have_the_results_of_eager(name):
    real = getattr(eager, name)(*small(name).values())
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in small(name).values()]
        fake = getattr(torch.ops.bootgrad, name)(*values)
    real, fake = ((r if isinstance(r, tuple) else (r,)) for r in (real, fake))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@EVERY_OP
def test_fakes_refuse_what_eager_refuses(name):
    right = small(name)
    first = next(a for a in right if a != "gy")
    for wrong in (dict(gy=right["gy"][:1]), {first: right[first].double()}, {first: right[first][0]}):
        values = (right | wrong).values()
        with pytest.raises(RuntimeError) as real:
            getattr(eager, name)(*values)
        values = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in values]
        with pytest.raises(RuntimeError) as fake:
            getattr(torch.ops.bootgrad, name)(*values)
        assert str(real.value) == str(fake.value)


@EVERY_OP
def test_every_tensor_must_be_where_x_is(name):
    """A pointer to the CPU's memory, handed to a kernel on a GPU, is a fault or nonsense."""
    right = small(name)
    others = [
        a for a, value in right.items() if isinstance(value, torch.Tensor) and a != ("x" if "x" in right else "gy")
    ]
    for a in others:
        with pytest.raises(RuntimeError, match=f"{a} must be on |x and {a} must be on one device") as error:
            getattr(eager, name)(*(right | {a: right[a].to("meta")}).values())
        assert "meta" in str(error.value) and "cpu" in str(error.value)


def test_output_size_is_torch_s():
    for S, K, stride, padding, dilation in ((9, 3, 2, 1, 1), (7, 2, 3, 0, 4), (5, 5, 1, 2, 1), (1, 1, 1, 0, 1)):
        y = torch.nn.functional.conv1d(torch.zeros(1, 1, S), torch.zeros(1, 1, K), None, stride, padding, dilation)
        assert schema.output_size([S], [K], [stride], [padding], [dilation]) == list(y.shape[2:])


def test_accumulation_dtypes():
    assert {d: schema.accumulation_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)} == {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }
    assert not any(takes(name, "dtype") for name in schema.SCHEMAS)
