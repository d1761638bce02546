"""The table of contents is complete: every op has an eager implementation, a fake and an oracle of its name."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bootgrad import reference
from bootgrad.ops import schema
from bootgrad.ops.backends import eager

from .cases import arguments, conv_case, linear_case, takes

EVERY_OP = pytest.mark.parametrize("name", schema.SCHEMAS)


def case_for(name):
    if name == "linear_rank1_sq_norms":
        case = linear_case(2, 1, 3, 4, torch.float32)
        return case.but(x=case.x[:, 0], gy=case.gy[:, 0])
    if name.startswith("linear"):
        return linear_case(2, 5, 3, 4, torch.float32)
    return conv_case(2, 3, (5,), 4, (2,), (1,), (0,), (1,), 1, torch.float32)


@EVERY_OP
def test_eager_has_the_schema_s_arguments(name):
    op = getattr(torch.ops.bootgrad, name).default
    assert list(inspect.signature(getattr(eager, name)).parameters) == [a.name for a in op._schema.arguments]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeExplicitAutograd")


@EVERY_OP
def test_the_dispatcher_finds_an_implementation(name):
    case = case_for(name)
    ours = getattr(torch.ops.bootgrad, name)(*arguments(name, case))
    expected = getattr(eager, name)(*arguments(name, case))
    torch.testing.assert_close(ours, expected)


@EVERY_OP
def test_reference_has_the_name_and_arguments(name):
    names = [a.name for a in getattr(torch.ops.bootgrad, name).default._schema.arguments]
    parameters = inspect.signature(getattr(reference, name)).parameters
    if name.startswith("linear"):
        assert list(parameters) == [n for n in names if n != "path"]
    else:
        # Stride, padding, dilation and groups are handed on to torch, which has its own names for and checks of them.
        geometry = {"stride", "padding", "dilation", "groups", "path"}
        own = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert own == [n for n in names if n not in geometry]


@EVERY_OP
def test_fakes_have_the_results_of_eager(name):
    case = case_for(name)
    real = getattr(eager, name)(*arguments(name, case))
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments(name, case)]
        fake = getattr(torch.ops.bootgrad, name)(*values)
    real, fake = ((r if isinstance(r, tuple) else (r,)) for r in (real, fake))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@EVERY_OP
def test_fakes_refuse_what_eager_refuses(name):
    case = case_for(name)
    for wrong in (case.but(gy=case.gy[:1]), case.but(gy=case.gy.double()), case.but(x=case.x[0])):
        with pytest.raises(RuntimeError) as real:
            getattr(eager, name)(*arguments(name, wrong))
        values = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(name, wrong)]
        with pytest.raises(RuntimeError) as fake:
            getattr(torch.ops.bootgrad, name)(*values)
        assert str(real.value) == str(fake.value)


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
