"""Models that torch has wrapped for several processes, and what a step does around their hooks.

The hooks of `DistributedDataParallel` wait for one backward pass into ``.grad``, and know of no derivative of it; those of
`fully_shard` gather parameters before a module's forward pass, and let them go and scatter their gradients after its backward
pass. A step here has several passes, whose gradients meet before they are written, so that both are held off: of a wrapped
model no hook runs, and of a sharded one parameters stay gathered for the length of a step, and ``.grad`` receives this rank's
shard of the whole gradient.
"""

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from .distributed import Ranks
from .errors import ArgumentError, UnsupportedError

Value = TypeVar("Value")


def ranks_of(*modules: nn.Module) -> Ranks | None:
    """The ranks that train the modules together; None where each process is on its own.

    Raises:
        UnsupportedError: parallelism of another kind, of a part of the modules alone, or with an option that would not be
            followed.
    """
    kinds = [_kind_of(module) for module in modules]
    if set(kinds) == {None}:
        return None
    if len(set(kinds)) > 1:
        raise UnsupportedError(
            "some of the modules are wrapped by DistributedDataParallel or fully_shard, others not or otherwise: wrap all alike"
        )
    ranks: list[Ranks] = [Wrapped(module) if isinstance(module, DDP) else Sharded(module) for module in modules]
    if len(ranks) == 1:
        return ranks[0]
    if any(r._group is not ranks[0]._group for r in ranks):
        raise UnsupportedError("the modules are in unlike process groups: wrap all of them with the same one")
    return Several(ranks)


def silent(ranks: Ranks | None) -> AbstractContextManager:
    """The context of a forward pass, see `Ranks.silent`."""
    return nullcontext() if ranks is None else ranks.silent()


def parameters_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a forward pass uses, whole, by the names that they have without a wrapper."""
    for name, p in _named_parameters(module):
        yield _as_written(name), p


def by_names_as_written(by_name: Mapping[str, Value]) -> dict[str, Value]:
    """The same by the names that `parameters_of` gives, where they are those of a compiled module's ``named_parameters``."""
    out = {_as_written(name) if isinstance(name, str) else name: value for name, value in by_name.items()}
    if len(out) < len(by_name):
        raise ArgumentError(f"a parameter is there by two names, with _orig_mod and without: {', '.join(by_name)}")
    return out


def _as_written(name: str) -> str:
    """A name without the modules that `torch.compile` puts around what it compiles."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, DDP):
        yield from module.module.named_parameters()
    elif _kind_of(module) == "sharded":
        whole = Sharded(module).whole()
        for name, p in module.named_parameters():
            yield name, whole[id(p)]
    else:
        yield from module.named_parameters()


def _kind_of(module: nn.Module) -> str | None:
    fsdp = _fsdp_module()
    for name, child in module.named_modules():
        if isinstance(child, nn.SyncBatchNorm) and child.training and dist.is_available() and dist.is_initialized():
            raise UnsupportedError(
                f"{name} is a SyncBatchNorm, which couples the samples of all ranks, so that none has a gradient of its own: "
                "bootgrad.replace_batchnorm puts group norms in place of batch norms"
            )
        if isinstance(child, DDP) and child is not module:
            raise UnsupportedError(
                f"{name} is a DistributedDataParallel inside of a module whose other parameters no rank tells the others of: "
                "wrap the whole"
            )
        if isinstance(child, fsdp) and not isinstance(module, fsdp):
            raise UnsupportedError(
                f"{name} is sharded by fully_shard, and the module around it is not: call fully_shard on the whole, too"
            )
    if isinstance(module, DDP):
        return "wrapped"
    if isinstance(module, fsdp):
        return "sharded"
    tensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for name, p in module.named_parameters():
        if isinstance(p, tensor):
            raise UnsupportedError(
                f"parameter {name} is a DTensor, as of tensor parallelism, of which no rank has a whole sample's gradient: use "
                "DistributedDataParallel or fully_shard on one mesh of data-parallel ranks"
            )
    return None


class Wrapped(Ranks):
    """The ranks of a `DistributedDataParallel`."""

    def __init__(self, wrapper: DDP):
        """Take its group.

        Raises:
            UnsupportedError: an option that would not be followed.
        """
        if not wrapper.require_backward_grad_sync:
            raise UnsupportedError(
                "no_sync() would leave the gradient of a part of the batch on its rank, where it is not reduced later: let the "
                "micro-batches of one batch come in a block of accumulate, without no_sync()"
            )
        trained = {name for name, p in wrapper.module.named_parameters() if p.requires_grad}
        ignored = trained & set(wrapper.parameters_to_ignore)
        without = "make it without"
        _refuse(
            "the DistributedDataParallel has",
            ("static_graph=True", wrapper.static_graph, without),
            ("a communication hook", wrapper._comm_hooks, without),
            ("mixed_precision", wrapper.mixed_precision is not None, "take torch.autocast"),
            (f"parameters that it ignores, {', '.join(sorted(ignored))}", ignored, without),
        )
        super().__init__(wrapper.process_group)
        self._wrapper = wrapper

    def silent(self):
        """As `Ranks`; the first pass of a step brings the buffers of rank 0, as ever."""
        return self._wrapper.no_sync()

    def end(self):
        """The next forward pass is the first of a step."""
        self._wrapper.require_forward_param_sync = True


_gathered: "weakref.WeakKeyDictionary[nn.Module, list[int]]" = weakref.WeakKeyDictionary()  # at which versions
_watched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_ours: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # in a forward pass of a step


class Sharded(Ranks):
    """The ranks of a model that `fully_shard` was called on."""

    def __init__(self, root: Any):
        """Take its group.

        Raises:
            UnsupportedError: parameters that are not sharded, or not over one group, or an option that would not be followed.
        """
        modules: list[Any] = [module for module in root.modules() if isinstance(module, _fsdp_module())]
        self._root, self._modules = root, modules
        self._states = list({id(s): s for s in (module._get_fsdp_state() for module in modules)}.values())
        self._groups = [group for state in self._states for group in _groups_of(state)]
        self._parts = [part for group in self._groups for part in group.fsdp_params]
        one_mesh = "use one mesh, of data-parallel ranks"
        _refuse(
            "fully_shard was given",
            ("a param_dtype", any(s._mp_policy.param_dtype for s in self._states), "take torch.autocast"),
            ("an offload_policy", any(part.offload_to_cpu for part in self._parts), "leave it out"),
            ("a mesh of several dimensions", any(part.mesh_info.mesh.ndim > 1 for part in self._parts), one_mesh),
            ("parameters of tensor parallelism", any(part.is_dtensor for part in self._parts), one_mesh),
        )
        known = {id(t) for part in self._parts for t in (part.sharded_param, getattr(part, "_unsharded_param", None))}
        for name, p in root.named_parameters():
            if id(p) not in known:
                raise UnsupportedError(
                    f"parameter {name} is not sharded, so that no rank tells the others of its gradient: leave it out of "
                    "ignored_params"
                )
        groups = [group.mesh_info.shard_process_group for group in self._groups]
        if any(group is not groups[0] for group in groups):
            raise UnsupportedError("parameters are sharded over unlike process groups: use one mesh")
        super().__init__(groups[0])

    def whole(self) -> dict[int, Tensor]:
        """The whole parameters by the ids of what stands for them in the module now; their memory is there when gathered."""
        if not all(hasattr(part, "_unsharded_param") for part in self._parts):
            self.gather()
            self.end()
        return {
            id(t): part._unsharded_param for part in self._parts for t in (part.sharded_param, part._unsharded_param)
        }

    def versions(self):
        """Of the shards."""
        return [part._sharded_local_tensor._version for part in self._parts]

    def gather(self):
        """All parameters; until the end the model's hooks believe to be within a backward pass, where they do nothing."""
        versions = self.versions()
        if _gathered.get(self._root) != versions:
            self.end()  # of one that nobody took
        self._root._get_fsdp_state()._lazy_init()
        for module in self._modules:
            module.unshard()
        self._set_state("PRE_BACKWARD")
        _gathered[self._root] = versions
        if self._root not in _watched:
            _watched.add(self._root)
            self._root.register_forward_pre_hook(_let_go, prepend=True)

    @contextmanager
    def silent(self):
        """As `Ranks`."""
        self.gather()
        _ours.add(self._root)
        try:
            yield
        finally:
            _ours.discard(self._root)

    def end(self):
        """Let the parameters go."""
        if _gathered.pop(self._root, None) is None:
            return
        self._set_state("IDLE")
        for module in self._modules:
            module.reshard()

    def stored(self, leaves, grads):
        """Sharded parameters, and the shards of whole gradients."""
        from torch.distributed.tensor import DTensor

        parts = {id(part._unsharded_param): part for part in self._parts}
        out: list[tuple[Tensor, Tensor | None]] = []
        for leaf, g in zip(leaves, grads, strict=True):
            part = parts.get(id(leaf))
            if part is None or g is None:
                out.append((leaf if part is None else part.sharded_param, g))
                continue
            p = part.sharded_param
            (placement,) = p.placements
            chunks = g.chunk(self.size, placement.dim)
            own = chunks[self.rank] if self.rank < len(chunks) else g.narrow(placement.dim, 0, 0)
            own = own.clone(memory_format=torch.contiguous_format)
            shard = DTensor.from_local(
                own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
            out.append((p, shard))
        return [leaf for leaf, _ in out], [g for _, g in out]

    def _set_state(self, name: str) -> None:
        for holder in (*self._states, *self._groups):
            holder._training_state = type(holder._training_state)[name]


class Several(Ranks):
    """The same ranks, of several modules."""

    def __init__(self, ranks: Sequence[Ranks]):
        """Keep them."""
        super().__init__(ranks[0]._group)
        self._ranks = ranks

    @contextmanager
    def silent(self):
        """Of all."""
        with ExitStack() as contexts:
            for ranks in self._ranks:
                contexts.enter_context(ranks.silent())
            yield

    def gather(self):
        """All."""
        for ranks in self._ranks:
            ranks.gather()

    def end(self):
        """Of all."""
        for ranks in self._ranks:
            ranks.end()

    def versions(self):
        """Of all."""
        return [version for ranks in self._ranks for version in ranks.versions()]

    def stored(self, leaves, grads):
        """Of each in turn, whose leaves are unlike."""
        for ranks in self._ranks:
            leaves, grads = ranks.stored(leaves, grads)
        return leaves, grads


def _let_go(root: nn.Module, *_: Any) -> None:
    """Before a forward pass of somebody else's: the model is as `fully_shard` left it."""
    if root in _gathered and root not in _ours:
        Sharded(root).end()


def _fsdp_module() -> Any:
    """What `fully_shard` makes of a module; nothing where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _groups_of(state: Any) -> list:
    groups = getattr(state, "_fsdp_param_groups", None)  # one, before there could be several
    return list(groups) if groups is not None else [g for g in (state._fsdp_param_group,) if g is not None]


def _refuse(subject: str, *options: tuple[str, Any, str]) -> None:
    """Raise for the first option, of name, whether it is set, and remedy, that is set."""
    for name, is_set, remedy in options:
        if is_set:
            raise UnsupportedError(
                f"{subject} {name}, which a reduction outside of its hooks would not follow: {remedy}"
            )
