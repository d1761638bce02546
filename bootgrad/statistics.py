"""First-order statistics of a backward pass: per-sample norms, covariance trace, noise scale, at little more than its price.

    s_i = ‖g_i‖²        Γ = (1/B) Σ_i ‖g_i − ḡ‖² = (1/B) Σ_i s_i − ‖ḡ‖²        noise scale = Γ / ‖ḡ‖²

Statistics always speak of the per-sample gradients g_i themselves, whatever weights the losses were reduced with.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import graph, waiting
from .compiled import compiling_for, refuse_compiled
from .distributed import guarded
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .grads import add_to_grads, call_hooks, gated
from .graph import Reach, as_met, filled, refuse_marked
from .heap import keep_freed_memory
from .ops.distances import sq_distances
from .ops.schema import accumulation_dtype
from .per_sample import Direction, PerSampleGradients, as_parameter_dict, grouped
from .rank_statistics import Everywhere, Exchange
from .recording import Recording
from .rules.base import Phase
from .rules.process_wide import eager
from .rules.terms import DenseTerm, Term
from .scaling import Number, Scaling, multiplied, peak_of, seeds, without_autocast


@dataclass(frozen=True, repr=False)
class Moments:
    """Per-sample squared norms of one parameter, or of all, and the norm of their mean.

    Where several ranks train a model together, norms (B,) are those of the samples on this one, and all else that of the batch.

    Attributes:
        sq_norms: ‖g_i‖², (B,).
        sq_mean_norm: ‖ḡ‖², ().
        deviation_sq_norms: ‖g_i − c‖², (B,), where a center was given.
        sq_mean_deviation: ‖ḡ − c‖², (), where a center was given.
        everywhere: means over the samples of all ranks, where there are several.
    """

    sq_norms: Tensor
    sq_mean_norm: Tensor
    deviation_sq_norms: Tensor | None = None
    sq_mean_deviation: Tensor | None = None
    everywhere: Everywhere | None = None

    def __repr__(self) -> str:
        """What is one number for the batch; norms (B,) would be pages."""
        names = ("batch_size", "covariance_trace", "sq_mean_norm", "reg1", "reg2")
        told = {name: value for name in names if (value := getattr(self, name)) is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    @property
    def batch_size(self) -> int:
        """B."""
        return self.sq_norms.numel() if self.everywhere is None else self.everywhere.batch_size

    @property
    def mean_sq_norm(self) -> Tensor:
        """(1/B) Σ_i ‖g_i‖²."""
        return self.sq_norms.mean() if self.everywhere is None else self.everywhere.mean_sq_norm.to(self.sq_norms)

    @property
    def covariance_trace(self) -> Tensor:
        """Γ = (1/B) Σ_i ‖g_i − ḡ‖², subtracted about zero or about the center: what ḡ is nearer to keeps more digits."""
        norms, deviations = self.sq_norms, self.deviation_sq_norms
        if self.everywhere is not None:
            norms, deviations = self.everywhere.mean_sq_norm, self.everywhere.mean_sq_deviation
        covariance = difference(norms, self.sq_mean_norm)
        if deviations is not None and self.sq_mean_deviation is not None:
            about_center = difference(deviations, self.sq_mean_deviation)
            covariance = torch.where(self.sq_mean_deviation < self.sq_mean_norm, about_center, covariance)
        return covariance.to(self.sq_norms.dtype)

    @property
    def minibatch_covariance_trace(self) -> Tensor:
        """Γ / B, the trace of the covariance of a mini-batch gradient. Source: arXiv 2512.07676, eq. 10."""
        return self.covariance_trace / self.batch_size

    @property
    def noise_scale(self) -> Tensor:
        """Γ / ‖ḡ‖², the plug-in ratio: biased, it saturates near B. `NoiseScale` averages its unbiased parts."""
        return self.covariance_trace / self.sq_mean_norm

    @property
    def reg1(self) -> Tensor | None:
        """(1/B) Σ_i ‖g_i − c‖², where a center was given."""
        if self.deviation_sq_norms is None:
            return None
        if self.everywhere is None or self.everywhere.mean_sq_deviation is None:
            return self.deviation_sq_norms.mean()
        return self.everywhere.mean_sq_deviation.to(self.deviation_sq_norms)

    @property
    def reg2(self) -> Tensor | None:
        """‖ḡ − c‖², where a center was given."""
        return self.sq_mean_deviation


def difference(norms: Tensor, mean_norm: Tensor) -> Tensor:
    """mean(norms) − mean_norm, which cannot be negative, subtracted in float64."""
    return (norms.double().mean() - mean_norm.double()).clamp(min=0).to(norms.dtype)


class CheckedOnRead:
    """Results of losses whose finiteness was not waited for: whoever reads one first does, and gets the error."""

    unchecked: Tensor | None = None

    def __getattribute__(self, name: str) -> Any:
        """Raise ArgumentError, and name the samples, if a loss was NaN or infinite."""
        if not name.startswith("_") and name != "unchecked":
            losses = self.__dict__.get("unchecked")
            if losses is not None:
                graph.refuse_losses(losses)
                self.__dict__["unchecked"] = None
        return super().__getattribute__(name)


@dataclass(frozen=True, repr=False)
class Statistics(CheckedOnRead, Moments):
    """`Moments` of all parameters together, and of each by name in ``per_parameter``.

    On an accelerator, the first read of a result raises if the losses were not finite; ``.grad`` was then left as it was.
    """

    per_parameter: Mapping[str, Moments] | None = None
    unchecked: Tensor | None = None

    def __repr__(self) -> str:
        """As of `Moments`, and of how many parameters."""
        return f"{super().__repr__()[:-1]}, per_parameter=<{len(self.per_parameter or ())} names>)"


def combine(parts: Mapping[str, Moments], unchecked: Tensor | None = None) -> Statistics:
    """The moments of all parameters from those of each, of losses that may still turn out not to be finite."""

    def total(values: Iterable[Any]) -> Any:
        values = list(values)
        return None if any(v is None for v in values) else sum(values)

    fields = ("sq_norms", "sq_mean_norm", "deviation_sq_norms", "sq_mean_deviation")
    totals = {f: total(getattr(m, f) for m in parts.values()) for f in fields}
    shares = [m.everywhere for m in parts.values() if m.everywhere is not None]
    if shares:
        means = (total(getattr(e, f) for e in shares) for f in ("mean_sq_norm", "mean_sq_deviation"))
        totals["everywhere"] = Everywhere(shares[0].batch_size, *means)
    return Statistics(**totals, per_parameter=dict(parts), unchecked=unchecked)


class record(Recording):  # noqa: N801 — used as a verb, like torch.no_grad
    """Record one forward pass of a model, for statistics of its backward pass or its per-sample gradients.

        with bootgrad.record(model) as rec:
            losses = loss_function(model(x), y)      # (B,)
        stats = rec.backward(losses)

    Args:
        modules: one or several modules; parameters that do not require grad are left out.
        check: when to check that samples are dimension 0 of every operation and independent of each other, at the price of
            two backward passes: ``"first"``, second, fourth, eighth … step of a model with these shapes (every step, where
            positions are merged into the batch or samples are of unlike size), ``"always"``, or
            ``"never"``. Where the model puts samples in an order that changes with the data, and that may be their own in the
            first steps, ``"always"`` is needed.
        samples: where samples are not dimension 0, a long tensor of the shape of the data's leading dimensions, whose entries
            are the numbers 0 … B − 1 of the sample that each row or position belongs to; losses stay (B,). For data (T, B, …)
            that is ``torch.arange(B).expand(T, B)``, for documents that are packed into (1, N, …) the document of each token,
            for (B, T, …) whose tokens do not see each other, each with a loss, ``torch.arange(B * T).view(B, T)``. Where
            samples have unlike numbers of positions, rows are gathered for as many as the longest has. Nothing has to be waited
            for if it is on the CPU. Operations whose output has a row per sample in dimension 0, behind a pooling or inside of
            attention, are recorded as they are; where sizes allow several readings, the check finds the right one, and without
            a check the index is believed first.
        batchnorm: what to do with batch norm in training mode, under which every loss depends on every sample, and a sample
            has no gradient of its own. ``"refuse"``: an error. ``"contribution"``: in the place of g_i comes what sample i
            contributes to the gradient of all losses, the gradient by a copy of the parameters that this sample alone is
            computed with,

                c_i = ∂ Σ_j ℓ_j(θ_1, …, θ_B) / ∂θ_i  at  θ_1 = … = θ_B = θ,        (1/B) Σ_i c_i = ∇L.

            That is g_i where no statistics are shared. Means and products are as ever; the samples are not checked to be
            independent of each other, for they are not, and so nothing finds a batch that is not dimension 0 and has no index.
        compiled: whether compiled functions stay compiled: then `backward` has what it has elsewhere, but for a center, and
            there are no per-sample gradients. If not, or with ``samples`` or contributions, they run as they were written.
        parameters: names of those that statistics and per-sample gradients are of, for the price of these; all when None.
            `backward` fills the ``.grad`` of the others, too, and samples are checked where these are used.

    Of a model that `DistributedDataParallel` or `fully_shard` was called on, `backward` fills ``.grad`` with the gradient of
    the reduction over the samples of all ranks, and norms alone are about those of this one; see docs/distributed.md.

    Raises:
        ArgumentError, ArgumentTypeError: ``samples`` is not a long tensor, or has negative entries; an unknown ``batchnorm``;
            ``parameters`` that the modules do not have, or none.
        UnsupportedError: a ScriptModule among the modules, a complex parameter; in the forward pass, batch statistics.
    """

    def __init__(
        self,
        *modules: nn.Module,
        check: str = "first",
        samples: Tensor | None = None,
        batchnorm: str = "refuse",
        compiled: bool = True,
        parameters: Collection[str] | None = None,
    ):
        """Prepare to record ``modules``."""
        super().__init__(*modules, check=check, samples=samples, batchnorm=batchnorm, parameters=parameters)
        self._stays_compiled = compiled and samples is None and batchnorm == "refuse"
        self.last_reach: Reach | None = None
        for name, p in self.parameters.items():
            if p.is_complex():
                raise UnsupportedError(
                    f"parameter {name} is complex ({p.dtype}), and gradients here are real: freeze it, or make it in the "
                    "forward pass from a real one by torch.view_as_complex"
                )

    def _compiler_stance(self) -> AbstractContextManager[Any]:
        return compiling_for(self) if self._stays_compiled else eager

    def reach(self, losses: Tensor) -> Reach:
        """As `Recording.reach`, and refuse parameters whose gradient is changed or not stored as others are."""
        reach = super().reach(losses)
        for name, p in reach.parameters.items():
            if p._backward_hooks:
                raise UnsupportedError(
                    f"parameter {name} has a gradient hook, so that its gradient is not the mean of the per-sample gradients: "
                    "remove the hook, or change .grad after the backward pass"
                )
        for operation in reach.operations:
            if getattr(operation.edge.node, "_saved_sparse", False):
                raise UnsupportedError(
                    f"{operation.name} would give {' and '.join(map(self.name_of, operation.tracked))} a sparse gradient, "
                    "and gradients here are dense: make the embedding with sparse=False"
                )
        if self.unwatched:
            reach.other_leaves += self._unwatched_behind(reach)
        return reach

    def release(self) -> None:
        """Let go of the graph; the recording cannot be used again."""
        super().release()
        self.last_reach = None

    def backward(
        self,
        losses: Tensor,
        reduction: str | Tensor = "mean",
        center: Direction | None = None,
        retain_graph: bool = False,
        scaler: Any = None,
    ) -> Statistics:
        """Accumulate gradients as ``losses.mean().backward()`` would, and return the statistics of the g_i.

        Args:
            losses: (B,), one loss per sample.
            reduction: ``"mean"``, ``"sum"``, or weights (B,): what ``.grad`` receives is the gradient of that reduction.
                Weights that are not all alike cost a second backward pass.
            center: {name: tensor} or flat (P,); adds ``deviation_sq_norms``, ``reg1`` and ``reg2`` about it.
            retain_graph: keep the graph for a further backward pass.
            scaler: a `torch.amp.GradScaler`: ``.grad`` is scaled by its factor, for ``scaler.step(optimizer)``, and what is not
                finite is no error but left in ``.grad``, for the scaler to skip the step. Statistics are of the unscaled
                gradients.

        Raises:
            ArgumentError: losses, weights or center of a wrong shape, or losses that are not finite.
            RecordingError: nothing recorded, a freed graph, or losses that do not depend on the model.
            UnsupportedError: per-sample gradients would not exist or would come out wrong. ``.grad`` is untouched by errors.
        """
        if self.ranks is None:
            with without_autocast(losses):
                return self._backward(losses, reduction, center, retain_graph, scaler)
        sets = 1 + isinstance(reduction, Tensor)
        whole = {**self.parameters, **self.unwatched}
        exchange = Exchange(self.ranks, whole, center is not None, sets, watched=len(self.parameters))
        with without_autocast(losses), guarded(exchange.rounds, keep=retain_graph):
            return self._backward_of_ranks(losses, reduction, center, retain_graph, scaler, exchange)

    def _backward_of_ranks(
        self,
        losses: Tensor,
        reduction: str | Tensor,
        center: Direction | None,
        retain_graph: bool,
        scaler: Any,
        exchange: Exchange,
    ) -> Statistics:
        """The same where this is one rank of several, with the gradient of the reduction over the batch of all."""
        exchange.rounds.ranks.gather()
        self.scaling = Scaling(scaler, losses.device if isinstance(losses, Tensor) else None)
        reach, (weights, _) = self.reach(losses), _weights(reduction, losses)
        named = {**reach.parameters, **self._unwatched_first(reach)}
        centers = None if center is None else as_parameter_dict(center, self.parameters, "center")
        weighted, factor = isinstance(reduction, Tensor), 1 / losses.numel() if reduction == "mean" else 1.0
        a: Number = 1.0 if reach.narrow is None else self._scale(reach).sample
        scaled = None if centers is None else {name: c * a for name, c in centers.items()}
        with exchange.rounds.arriving(1 / a):
            grads, norms = self._first_order(losses, reach, seeds(losses, a), scaled, retain_graph or weighted)
        sets = [dict(zip(named, grads, strict=False))]
        leaves = [*reach.parameters.values(), *reach.other_leaves]
        if weighted:
            peak = 1.0 if reach.narrow is None else peak_of(weights)
            grads = self.gradients(losses, leaves, weights / peak * a, retain_graph=retain_graph, allow_unused=True)
            grads = multiplied(grads, peak)
            sets.append(dict(zip(named, grads, strict=False)))
        others = multiplied(grads[len(named) :], factor / a)
        if reach.narrow is not None:
            norms = {name: (s / a**2, None if d is None else d / a**2) for name, (s, d) in norms.items()}
        exchange.bring(sets, 1 / a, answered(losses, reach.finite, self.scaling))
        statistics = summarized(
            self.parameters, {}, norms, losses, 1.0, 1.0, centers, self.scaling, reach.finite, exchange
        )
        own = multiplied(list(exchange.mean(-1).values()), 1.0 if reduction == "mean" else float(statistics.batch_size))
        leaves = [*self.parameters.values(), *self.unwatched.values(), *leaves[len(named) :]]
        grads = self.scaling.scaled([*own, *others])
        grads = gated(grads, exchange.finite, self.scaling.skips)
        leaves, grads = exchange.rounds.ranks.stored(leaves, grads)
        add_to_grads(leaves, grads)
        if not retain_graph:
            self.release()
        call_hooks(leaves, grads)
        return statistics

    def _backward(
        self, losses: Tensor, reduction: str | Tensor, center: Direction | None, retain_graph: bool, scaler: Any
    ) -> Statistics:
        self.scaling = Scaling(scaler, losses.device if isinstance(losses, Tensor) else None)
        reach = self.reach(losses)
        weights, uniform = _weights(reduction, losses)
        centers = None if center is None else as_parameter_dict(center, self.parameters, "center")
        scale = self._scale(reach)
        # Statistics are taken of a g_i; gradients are multiplied by ``rest`` afterwards.
        a: Number = 1.0 if uniform is None else uniform
        rest = scale.to_grad
        if reach.narrow is not None:
            peak = peak_of(weights) if uniform is None else uniform
            a, weights, rest = scale.sample, weights / peak * scale.sample, rest * peak * losses.numel()
            rest = scale.to_grad if isinstance(reduction, str) and reduction == "mean" else rest
        scaled = None if centers is None else {name: c * a for name, c in centers.items()}
        grads, norms = self._first_order(losses, reach, seeds(losses, a), scaled, retain_graph or uniform is None)
        by_name = dict(zip(reach.parameters, grads, strict=False))
        # Zeros have no part in a norm; a single sample's gradient may come past the record, too.
        if centers is None and self.batch_size > 1 and waiting.answers_at_once(losses):
            by_name |= {name: by_name[name].index_select(0, rows) for name, rows in self._few_rows(reach).items()}
        ratio = 1 / losses.numel()
        statistics = summarized(self.parameters, by_name, norms, losses, a, ratio, scaled, self.scaling, reach.finite)
        leaves = [*reach.parameters.values(), *reach.other_leaves]
        if uniform is None:
            grads = self.gradients(losses, leaves, weights, retain_graph=retain_graph, allow_unused=True)
        add_to_grads(leaves, gated(multiplied(grads, rest), reach.finite, self.scaling.skips))
        if not retain_graph:
            self.release()
        call_hooks(leaves, grads)
        return statistics

    def _unwatched_behind(self, reach: Reach) -> list[Tensor]:
        """Parameters that are not watched, of which weights are made together with watched ones."""
        wanted = {id(p): p for p in self.unwatched.values()}
        for t in reach.other_leaves:
            wanted.pop(id(t), None)
        derived = (t.grad_fn for o in reach.operations for t in o.tracked if self._known[id(t)] is not None)
        stack, seen, found = list(derived), set(), []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            stack += [successor for successor, _ in node.next_functions]
            variable = getattr(node, "variable", None)
            if variable is not None and wanted.pop(id(variable), None) is not None:
                found.append(variable)
        return found

    def _unwatched_first(self, reach: Reach) -> dict[str, Tensor]:
        """The model's own among the other leaves, by name, which are put before those outside of it."""
        outside = {id(t): t for t in reach.other_leaves}
        unwatched = {name: p for name, p in self.unwatched.items() if outside.pop(id(p), None) is not None}
        reach.other_leaves = [*unwatched.values(), *outside.values()]
        return unwatched

    def _few_rows(self, reach: Reach) -> dict[str, Tensor]:
        """The rows that gradients can be other than zero in, of parameters in which they are few: tables of embeddings."""
        found: dict[str, list[Tensor]] = {}
        whole: set[str] = set()
        for operation in reach.operations:
            for t in operation.tracked:
                rows = operation.rows_reached if self._known[id(t)] is None else None
                for name in (self._names[id(leaf)] for leaf in self.leaves(t)):
                    if rows is None:
                        whole.add(name)
                    else:
                        found.setdefault(name, []).append(rows)
        known = {name: torch.cat(rows) for name, rows in found.items() if name not in whole}
        return {name: rows.unique() for name, rows in known.items() if rows.numel() < self.parameters[name].size(0)}

    def _first_order(
        self, losses: Tensor, reach: Reach, seed: Tensor, scaled: dict[str, Tensor] | None, retain_graph: bool
    ) -> tuple[Sequence[Any], dict[str, tuple[Tensor, Tensor | None]]]:
        """Gradients of all leaves under Σ a ℓ_i, and ‖a g_i‖² and ‖a g_i − a c‖² by parameter that is reached.

        ``seed`` holds a for each sample, ``scaled`` a c by name, or None.
        """
        B = self.batch_size
        leaves = [*reach.parameters.values(), *reach.other_leaves]
        probed, others = self.split(reach.operations) if B > 1 else ([], [])
        if scaled is not None:
            refuse_compiled(reach.operations, "statistics about a center")
        if others:
            shared = [self._names[leaf] for leaf, uses in self._count_uses(reach.operations).items() if uses > 1]
            refuse_compiled(others, f"norms of {', '.join(shared)}, which several operations use,")
        inputs = [*leaves, *(o.probe for o in probed), *(o.edge for o in others)]
        with self.in_phase(Phase.STATISTICS, probed, scaled), as_met([o.edge for o in others]) as met:
            grads = self.gradients(losses, inputs, seed, retain_graph=retain_graph or bool(others), allow_unused=True)
            of_others = met(grads[len(inputs) - len(others) :])
        leaf_grads, rest = grads[: len(leaves)], grads[len(leaves) :]
        by_name = dict(zip(reach.parameters, leaf_grads, strict=False))
        norms = self.read_probes(
            [o for o, g in zip(probed, rest, strict=False) if g is not None],
            [g for g in rest[: len(probed)] if g is not None],
        )
        with torch.no_grad():
            terms: dict[str, Term] = self.terms(others, filled(of_others, others, losses))
            if B == 1:
                terms = {name: DenseTerm(g.unsqueeze(0)) for name, g in by_name.items() if g is not None}
            for name, term in terms.items():
                norms[name] = (term.sq_norms(), None if scaled is None else term.sq_norms(scaled[name]))
        return leaf_grads, norms

    def _refuse_rows_of_nobody(self, reach: Reach, gys: Sequence[Tensor]) -> None:
        """Raise if rows that have no gradient, so that nothing tells whose they are, would have one at other parameters.

        A norm's derivative is then another with another owner. Rows that ReLUs or routers leave out have none anywhere.
        """
        found = {}
        for operation, gy in zip(reach.operations, gys, strict=True):
            nobody = None if operation.reading is None else operation.reading.nobody
            if nobody is not None and gy.requires_grad:
                rows = gy[nobody.to(gy.device)]
                unlike = torch.arange(1, rows.numel() + 1, device=gy.device).sin().view(rows.shape)
                found[operation] = (rows * unlike.to(rows.dtype)).sum()
        if not found:
            return
        leaves = list(reach.parameters.values())
        grads = torch.autograd.grad(list(found.values()), leaves, retain_graph=True, allow_unused=True)
        if any(g is not None and bool(g.any()) for g in grads):
            raise UnsupportedError(
                f"some rows of {' and '.join(map(self.describe, found))} have no gradient here, so that nothing tells which "
                "sample they are of, but would have one at other parameters, which penalties ask for: tell the recording, by "
                "record(model, samples=index), or lay out the rows in the samples' order"
            )

    def per_sample_gradients(self, losses: Tensor, create_graph: bool = False) -> PerSampleGradients:
        """The implicit B×P matrix of the per-sample gradients.

        Args:
            losses: (B,), one loss per sample.
            create_graph: make the matrix differentiable, for penalties. The recording's graph is kept either way.

        Raises:
            BootgradError: as `backward`.
        """
        if create_graph and self.ranks is not None:
            raise UnsupportedError(
                "a penalty made of per-sample gradients would be this rank's own, and its gradient stay here: take "
                "GradientRegularizer, or record the module inside of the DistributedDataParallel and average .grad over ranks"
            )
        with without_autocast(losses):
            if self.ranks is not None:
                self.ranks.gather()
            return self._per_sample_gradients(losses, self.reach(losses), create_graph)

    def _per_sample_gradients(
        self, losses: Tensor, reach: Reach, create_graph: bool, visited: bool = False, scale: Number = 1.0
    ) -> PerSampleGradients:
        """``scale`` times `per_sample_gradients`; where they can be, weights are held as `VisitedTerm`, once differentiable."""
        self.last_reach = reach
        refuse_compiled(reach.operations, "penalties" if create_graph else "per-sample gradients")
        if create_graph and losses.device.type == "cpu":
            keep_freed_memory()
        # With weights that require grad, a function that can be differentiated once leaves a mark in whatever passes it.
        weights = seeds(losses, scale).requires_grad_(create_graph)
        if self.batch_size == 1:
            leaves = list(reach.parameters.values())
            options = dict(create_graph=create_graph, retain_graph=True, allow_unused=True)
            grads = self.gradients(losses, leaves, weights, **options)
            refuse_marked(grads)
            rows = zip(reach.parameters, grads, strict=True)
            terms: dict[str, Term] = {name: DenseTerm(g.unsqueeze(0)) for name, g in rows if g is not None}
        else:
            visits = self.visitable(reach.operations) if visited and create_graph else []
            gys = self.output_gradients(losses, weights, reach.operations, create_graph, visits)
            refuse_marked(gys)
            if create_graph:
                self._refuse_rows_of_nobody(reach, gys)
            with torch.set_grad_enabled(create_graph), self.in_phase(Phase.OUTPUTS, visits):
                terms = self.terms(reach.operations, gys)
        if not create_graph:
            terms = {name: term.map(Tensor.detach) for name, term in terms.items()}
        in_order = self.samples is None and all(o.reading is None for o in reach.operations)
        return PerSampleGradients(terms, self.parameters, self.batch_size, create_graph, in_order)


@torch.no_grad()
def summarized(
    parameters: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    norms: Mapping[str, tuple[Tensor, Tensor | None]],
    losses: Tensor,
    scale: Number,
    ratio: float,
    scaled: Mapping[str, Tensor] | None,
    scaling: Scaling,
    finite: Tensor | None,
    exchange: Exchange | None = None,
) -> Statistics:
    """The statistics of the g_i.

    Args:
        parameters: by name, all of them.
        grads: (a/ratio) ḡ by name, where they are reached.
        norms: ‖a g_i‖² and, about a center, ‖a g_i − a c‖², (B,), by name, where they are reached.
        losses: (B,), which may still turn out not to be finite.
        scale: a.
        ratio: of a to the factor before ḡ.
        scaled: a c by name, or None.
        scaling: whether what is not finite is an error, or a number that is none.
        finite: whether the losses are, where that was not waited for.
        exchange: with the other ranks, from which ``grads`` come then.
    """
    if scaling.skips and finite is not None:
        scale = torch.where(finite, scale, torch.nan)
    rows, parts = [], {}
    for name, p in parameters.items():
        rows.append(norms[name][0] if name in norms else p.new_zeros(losses.numel(), dtype=accumulation_dtype(p.dtype)))
    sq_norms = grouped(rows, lambda s: torch.stack(s) / scale**2)
    deviations: list[Tensor] | None = None
    if scaled is not None:
        deviations = []
        for name, s in zip(parameters, rows, strict=True):
            deviation = norms[name][1] if name in norms else s + sq_distances([scaled[name]])[0].to(s.dtype)
            assert deviation is not None
            deviations.append(deviation / scale**2)
    everywhere: list[Everywhere] | None = None
    if exchange is not None:
        everywhere, grads = exchange.meet(sq_norms, deviations), exchange.mean()
    dense = [torch.zeros_like(p) if (g := grads.get(name)) is None else g for name, p in parameters.items()]
    sq_means = (sq_distances(dense) / (scale / ratio) ** 2).unbind()
    if scaled is not None:
        mean_deviations = (sq_distances(dense, [scaled[name] for name in parameters], ratio) / scale**2).unbind()
    for k, (name, s) in enumerate(zip(parameters, rows, strict=True)):
        parts[name] = Moments(
            sq_norms[k],
            sq_means[k].to(s.dtype),
            None if deviations is None else deviations[k],
            None if deviations is None else mean_deviations[k].to(s.dtype),
            None if everywhere is None else everywhere[k],
        )
    return combine(parts, losses.detach() if finite is not None and not scaling.skips else None)


def answered(losses: Tensor, finite: Tensor | None, scaling: Scaling) -> Tensor | None:
    """Whether losses are finite, asked for at once, as between ranks, who wait for each other anyway; None where they are.

    Raises:
        ArgumentError: they are not, and no scaler skips the step.
    """
    if finite is not None and not scaling.skips:
        graph.refuse_losses(losses)
        return None
    return finite


def _weights(reduction: str | Tensor, losses: Tensor) -> tuple[Tensor, float | None]:
    """Weights (B,), and the one number that they all are, if they are known to be and its square is in float32's range."""
    B = losses.numel()
    if isinstance(reduction, Tensor):
        if reduction.shape != (B,):
            raise ArgumentError(f"weights must have shape ({B},), one per loss; got {tuple(reduction.shape)}")
        if reduction.is_complex():
            raise ArgumentTypeError(f"weights must be real; got {reduction.dtype}")
        weights = reduction.detach().to(losses).clone()
        if not waiting.answers_at_once(losses):
            return weights, None
        if not torch.isfinite(weights).all():
            raise ArgumentError("weights must be finite; got NaN or infinity")
        first = float(weights[0])
        return weights, first if bool((weights == first).all()) and 1e-9 <= abs(first) <= 1e9 else None
    if not isinstance(reduction, str):
        raise ArgumentTypeError(f'reduction must be "mean", "sum" or weights (B,); got {type(reduction).__name__}')
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f'reduction must be "mean", "sum" or weights (B,); got {reduction!r}')
    weight = 1 / B if reduction == "mean" else 1.0
    return seeds(losses, weight), weight
