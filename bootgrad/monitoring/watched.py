"""Which parameters are watched: all, those of normalization layers, or those of layers by name."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError, ArgumentTypeError
from ..recording import named_parameters
from .measuring import ROOT, layer_of

ALL, NORMALIZATION = "all", "normalization"
_KINDS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def watched(model: nn.Module, layers: str | Sequence[str]) -> tuple[str, ...] | None:
    """The names of the parameters that are watched; None for all.

    Args:
        model: whose they are.
        layers: ``"all"``; ``"normalization"``, layer, group, RMS, batch and instance norms and modules called norm that have
            parameters and no modules inside; or names of layers and parameters, with ``*`` and ``?`` for what is left open. A
            name stands for all below it.

    Raises:
        ArgumentError, ArgumentTypeError: a name of nothing, or a model without what is to be watched.
    """
    if isinstance(layers, str):
        if layers == ALL:
            return None
        if layers != NORMALIZATION:
            raise ArgumentError(
                f'layers must be "{ALL}", "{NORMALIZATION}" or a list of names; got {layers!r}: put a name into a list'
            )
        normalizing = set(_normalizing(model))
        found = tuple(name for name in named_parameters(model) if layer_of(name) in normalizing)
        if not found:
            raise ArgumentError(
                f'layers="{NORMALIZATION}" needs normalization layers with trained scales; the model has none: watch "{ALL}"'
            )
        return found
    if not isinstance(layers, Sequence) or not all(isinstance(pattern, str) for pattern in layers):
        raise ArgumentTypeError(f"layers must be a word or a list of names; got {layers!r}")
    if not layers:
        raise ArgumentError(f'layers must be a word or names of layers; got none: watch "{ALL}"')
    names = list(named_parameters(model))
    for pattern in layers:
        if not any(_matches(name, pattern) for name in names):
            known = ", ".join(dict.fromkeys(map(layer_of, names)))
            tied = ", ".join(_tied(model, pattern))
            raise ArgumentError(
                f"layers has {pattern!r}, whose parameters are tied to others and go by their names: take {tied}"
                if tied
                else f"layers has {pattern!r}, which no trained parameter of the model is in; there are: {known}"
            )
    return tuple(name for name in names if any(_matches(name, pattern) for pattern in layers))


def _normalizing(model: nn.Module) -> Iterator[str]:
    for path, module in _inner(model).named_modules():
        by_name = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
        if isinstance(module, _KINDS) or by_name:
            yield _as_written(path) or ROOT


def _tied(model: nn.Module, pattern: str) -> list[str]:
    """The names that the trained parameters of a pattern have where they are met first."""
    first: dict[int, str] = {}
    found = []
    for path, p in _inner(model).named_parameters(remove_duplicate=False):
        name = _as_written(path)
        if p.requires_grad and first.setdefault(id(p), name) != name and _matches(name, pattern):
            found.append(first[id(p)])
    return found


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _as_written(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _matches(parameter: str, pattern: str) -> bool:
    """Whether a parameter, or a module that it is in, has this name."""
    parts = parameter.split(".")
    paths = (".".join(parts[: k + 1]) for k in range(len(parts)))
    return layer_of(parameter) == pattern or any(fnmatchcase(path, pattern) for path in paths)
