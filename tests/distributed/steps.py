"""What each rank does, and compares with one process: statistics and penalties."""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel as DDP

import bootgrad
import bootgrad.distributed
import bootgrad.methods.random_signs
import bootgrad.steps

from ..methods.steps import CENTERS, SIGN_OPTIONS, flat, losses_of, regularizer, relative
from .models import PENALTIES, SPLITS, Branches, batch, pair, raised, same_gradients, same_report, same_steps

close = torch.testing.assert_close


def statistics_of_a_backward_pass(rank, size, wrap=DDP):
    x, y, rows = batch(size)
    own = rows[rank]
    center = torch.randn(26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.arange(len(x), dtype=torch.float64)
    for reduction, about in itertools.product(("mean", "sum", weights), (None, center)):
        model, wrapped = pair(wrap=wrap)
        of_rank = reduction[own] if isinstance(reduction, torch.Tensor) else reduction
        for _ in range(2):  # .grad is added to
            with bootgrad.record(model) as rec:
                losses = losses_of(model)(x, y)
            expected = rec.backward(losses, reduction, about)
            with bootgrad.record(wrapped) as rec:
                losses = losses_of(wrapped)(x[own], y[own])
            stats = rec.backward(losses, of_rank, about)
            same_statistics(stats, expected, own)
            same_gradients(wrapped, model)


def same_statistics(stats, expected, own):
    assert list(stats.per_parameter) == list(expected.per_parameter)  # without a prefix
    kinds = zip((stats, *stats.per_parameter.values()), (expected, *expected.per_parameter.values()), strict=True)
    for ours, theirs in kinds:
        for name in ("sq_norms", "deviation_sq_norms"):
            value = getattr(theirs, name)
            close(getattr(ours, name), None if value is None else value[own], rtol=1e-9, atol=1e-12)
        for name in ("covariance_trace", "mean_sq_norm", "sq_mean_norm", "batch_size", "reg1", "reg2", "noise_scale"):
            close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)


def statistics_of_some_parameters(rank, size, wrap=DDP):
    """Of those that are watched, first or last in the model; the others' gradients meet as well."""
    x, y, rows = batch(size)
    own = rows[rank]
    weights = torch.arange(len(x), dtype=torch.float64)
    for at, reduction in itertools.product((slice(2), slice(-1, None)), ("mean", "sum", weights)):
        model, wrapped = pair(wrap=wrap)
        outside = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        of_rank = reduction[own] if isinstance(reduction, torch.Tensor) else reduction
        names = [name for name, _ in model.named_parameters()][at]
        with bootgrad.record(model, parameters=names) as rec:
            losses = losses_of(model)(x, y) * outside[0].sum()
        expected = rec.backward(losses, reduction)
        with bootgrad.record(wrapped, parameters=names) as rec:
            losses = losses_of(wrapped)(x[own], y[own]) * outside[1].sum()
        stats = rec.backward(losses, of_rank)
        same_statistics(stats, expected, own)
        same_gradients(wrapped, model)
        (plain,) = torch.autograd.grad(
            _reduced(losses_of(model)(x[own], y[own]), of_rank) * outside[1].sum(), outside[1:]
        )
        close(outside[1].grad, plain)  # this rank's own


def _reduced(losses, reduction):
    if isinstance(reduction, torch.Tensor):
        return (reduction * losses).sum()
    return losses.mean() if reduction == "mean" else losses.sum()


def pieces_go_out_on_the_way(rank, size):
    """Gradients of the last layer before those of the first are made; what is told is the same, and so is an error then."""
    order, former = [], (bootgrad.distributed.PIECE_BYTES, bootgrad.distributed.dist.all_reduce)

    def reduced(piece, **options):
        order.append(piece.numel())
        return former[1](piece, **options)

    bootgrad.distributed.PIECE_BYTES, bootgrad.distributed.dist.all_reduce = (1, 1), reduced
    try:
        _, wrapped = pair()
        x, y, rows = batch(size)
        first, act, last = wrapped.module.layers

        def backward(hook):
            with bootgrad.record(wrapped, check="never") as rec:
                between = act(first(x[rows[rank]]))
                between.register_hook(hook)
                losses = F.cross_entropy(last(between), y[rows[rank]], reduction="none")
            rec.backward(losses)

        def failing(g):
            if rank == 1:
                raise KeyError("between")

        kind, _ = raised(lambda: backward(failing))
        assert kind == ("KeyError" if rank == 1 else "DistributedError")
        order.clear()
        backward(lambda g: order.append("between"))
        assert order[:3] == [2, 8, "between"] and order[3:5] == [4, 12] and len(order) == 6, order
        statistics_of_a_backward_pass(rank, size)
    finally:
        bootgrad.distributed.PIECE_BYTES, bootgrad.distributed.dist.all_reduce = former


def statistics_of_micro_batches(rank, size, wrap=DDP):
    x, y, rows = batch(size)
    own = rows[rank]
    center = torch.randn(26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for about in (None, center):
        model, wrapped = pair(wrap=wrap)
        with bootgrad.record(model) as rec:
            losses = losses_of(model)(x, y)
        expected = rec.backward(losses, center=about)
        with bootgrad.accumulate(wrapped, center=about) as whole:
            for part in zip(x[own].split(1 + rank), y[own].split(1 + rank), strict=True):  # as many as the rank has
                with whole.record():
                    losses = losses_of(wrapped)(*part)
                whole.backward(losses)
        same_statistics(whole.statistics, expected, own)
        same_gradients(wrapped, model)


def exact_penalties(rank, size, wrap=DDP):
    x, y, rows = batch(size)
    for center, penalties in itertools.product(CENTERS.values(), PENALTIES.values()):
        for parts in (None, 2):
            model, wrapped = pair(wrap=wrap)
            whole, ours = (regularizer(m, copy.deepcopy(center), **penalties) for m in (model, wrapped))
            same_steps(whole, ours, size, rows[rank], parts)


def other_penalties(rank, size, wrap=DDP):
    x, y, rows = batch(size)
    for center in CENTERS.values():
        for options in ({"method": "finite_difference", "epsilon": 1e-6}, {"every": 2}):
            model, wrapped = pair(wrap=wrap)
            whole, ours = (regularizer(m, copy.deepcopy(center), **options) for m in (model, wrapped))
            same_steps(whole, ours, size, rows[rank], rtol=1e-5, atol=1e-6)


def without_statistics(rank, size):
    """What a report tells without Γ depends on where the samples are; gradients and centers do not."""
    x, y, rows = batch(size)
    for center, penalties in itertools.product(CENTERS.values(), PENALTIES.values()):
        model, wrapped = pair()
        whole, ours = (
            regularizer(m, copy.deepcopy(center), statistics=False, every=2, **penalties) for m in (model, wrapped)
        )
        for _ in range(3):
            model.zero_grad()
            wrapped.zero_grad()
            expected = whole.backward(losses_of(model), x, y)
            report = ours.backward(losses_of(wrapped), x[rows[rank]], y[rows[rank]])
            same_gradients(wrapped, model)
            close(report.loss, expected.loss)
            for name in ("reg1", "reg2", "covariance_trace"):
                if getattr(report, name, None) is not None and not getattr(report, name).isnan():
                    close(getattr(report, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        close(ours.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)


def losses_in_place_of_a_function(rank, size):
    x, y, rows = batch(size)
    own = rows[rank]
    for center in CENTERS.values():
        model, wrapped = pair()
        whole, ours = (regularizer(m, copy.deepcopy(center)) for m in (model, wrapped))
        expected = whole.backward(losses_of(model), x, y)
        with ours.record():
            losses = losses_of(wrapped)(x[own], y[own])
        same_report(ours.backward(losses), expected)
        same_gradients(wrapped, model)


def fractions_averaged_over_all_subsets(rank, size):
    """Of two or one of each rank's samples: over all choices, gradients are the exact ones."""
    x, y, rows = batch(size)
    own = rows[rank]
    m, taken = SPLITS[size][rank], 1 if rank else 2
    given = []

    def draw(batch, fraction, generator):
        chosen = given.pop(0)
        return torch.tensor(chosen), torch.tensor([i for i in range(m) if i not in chosen], dtype=torch.long)

    former, bootgrad.steps.draw = bootgrad.steps.draw, draw
    try:
        for center in CENTERS.values():
            model, wrapped = pair()
            whole, ours = regularizer(model, copy.deepcopy(center)), regularizer(wrapped, center, fraction=0.5)
            choices = [
                [list(itertools.combinations(range(k), min(k, 1 if r else 2))) for r, k in enumerate(SPLITS[size])]
            ][0]
            given.append(list(range(min(m, taken))))
            whole.backward(losses_of(model), x.flip(0), y)
            ours.backward(losses_of(wrapped), x.flip(0)[own], y[own])
            state = copy.deepcopy(ours.state_dict())
            model.zero_grad()
            expected = whole.backward(losses_of(model), x, y)
            grads = []
            for choice in itertools.product(*choices):
                ours.load_state_dict(copy.deepcopy(state))
                given.append(list(choice[rank]))
                wrapped.zero_grad()
                report = ours.backward(losses_of(wrapped), x[own], y[own])
                grads.append(flat(wrapped))
                for name in ("loss", "covariance_trace", "reg2", "sq_mean_norm"):
                    close(getattr(report, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
            if center != "window":
                assert relative(torch.stack(grads).mean(0), flat(model)) < 1e-9
    finally:
        bootgrad.steps.draw = former


def random_signs_averaged_over_all_signs(rank, size):
    """Of ranks of two samples and one."""
    x, y, _ = batch(size)
    x, y, own = x[:3], y[:3], slice(0, 2) if rank == 0 else slice(2, 3)
    given = []
    former = bootgrad.methods.random_signs.draw_signs
    bootgrad.methods.random_signs.draw_signs = lambda m, generator: torch.tensor(given.pop(0))
    try:
        for center, (derivative, options) in itertools.product(CENTERS.values(), SIGN_OPTIONS.items()):
            model, wrapped = pair()
            exact = regularizer(model, copy.deepcopy(center))
            ours = regularizer(wrapped, copy.deepcopy(center), **options)
            given.append([1, 1] if rank == 0 else [1])
            exact.backward(losses_of(model), x.flip(0), y)
            ours.backward(losses_of(wrapped), x.flip(0)[own], y[own])
            state = copy.deepcopy(ours.state_dict())
            model.zero_grad()
            expected = exact.backward(losses_of(model), x, y)
            grads, reports = [], []
            for signs in itertools.product([1, -1], repeat=3):
                ours.load_state_dict(copy.deepcopy(state))
                given.append(list(signs[own]))
                wrapped.zero_grad()
                reports.append(ours.backward(losses_of(wrapped), x[own], y[own]))
                grads.append(flat(wrapped))
            tolerance = {"exact": 1e-9, "finite_difference": 1e-4}[derivative]
            assert relative(torch.stack(grads).mean(0), flat(model)) < tolerance
            for name in ("reg1", "covariance_trace"):
                mean = torch.stack([getattr(report, name) for report in reports]).mean()
                close(mean, getattr(expected, name), rtol=1e-9, atol=1e-12)
            close(reports[0].sq_mean_norm, expected.sq_mean_norm, rtol=1e-9, atol=1e-12)
    finally:
        bootgrad.methods.random_signs.draw_signs = former


def each_rank_draws_its_own_signs(rank, size):
    _, wrapped = pair()
    torch.manual_seed(3)
    ours = regularizer(wrapped, "zero", method="random_signs")
    seen = []
    former = bootgrad.methods.random_signs.draw_signs

    def draw(m, generator):
        seen.append(former(m, generator))
        return seen[-1]

    bootgrad.methods.random_signs.draw_signs = draw
    try:
        x = torch.randn(32, 3, dtype=torch.float64)
        ours.backward(losses_of(wrapped), x, torch.arange(32) % 2)
    finally:
        bootgrad.methods.random_signs.draw_signs = former
    return seen[0].tolist()


def what_some_ranks_do_not_reach(rank, size):
    """Gradients are zero there; what no rank reaches has none."""
    x, y, rows = batch(size)
    own = rows[rank]
    signs = torch.cat([torch.full((k,), 1.0 if r == 0 else -1.0) for r, k in enumerate(SPLITS[size])])
    x[:, 0] = x[:, 0].abs() * signs
    model, wrapped = pair(Branches)

    for center, parts in itertools.product(CENTERS.values(), (None, 2)):
        whole, ours = (regularizer(m, copy.deepcopy(center)) for m in (model, wrapped))
        for _ in range(2):
            model.zero_grad()
            wrapped.zero_grad()
            with whole.accumulate() as block:
                for part in rows:
                    whole.backward(losses_of(model), x[part], y[part])
            expected = block.report
            if parts is None:
                report = ours.backward(losses_of(wrapped), x[own], y[own])
            else:
                with ours.accumulate() as block:
                    for part in zip(x[own].split(parts), y[own].split(parts), strict=True):
                        ours.backward(losses_of(wrapped), *part)
                report = block.report
            same_report(report, expected)
            same_gradients(wrapped, model)
            assert wrapped.module.c.weight.grad is None


def half_precision_and_a_scaler(rank, size):
    """A step that overflows on one rank is skipped by all."""
    x, y, rows = batch(size, torch.float32)
    own = rows[rank]
    _, wrapped = pair(dtype=torch.float32)
    _, plain = pair(dtype=torch.float32)
    ours, expected = (bootgrad.GradientRegularizer(m, reg1=0.1, center="ema") for m in (wrapped, plain))
    scaler = GradScaler("cpu", init_scale=2.0**8)

    def losses(model, factor=1.0):
        def of(x, y):
            with torch.autocast("cpu", torch.float16):
                out = model(x)
            return F.cross_entropy(out.float(), y, reduction="none") * factor

        return of

    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for bad in (False, True, False):
        optimizer.zero_grad()
        plain.zero_grad()
        before = flat_values(wrapped)
        function = losses(wrapped, torch.inf if bad and rank == 1 else 1.0)
        report = ours.backward(function, x[own], y[own], scaler=scaler)
        assert bool(report.finite) is not bad and report.loss.isfinite() == (not bad)
        if not bad:
            expected.backward(losses(plain), x[own], y[own])
            a, b = flat(wrapped) / scaler.get_scale(), flat(plain)
            assert relative(a, b) < 2e-2
        scaler.step(optimizer)
        scaler.update()
        assert bool((flat_values(wrapped) == before).all()) is bad
        plain.load_state_dict(wrapped.state_dict())
    return flat_values(wrapped)


def flat_values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def squares(model):
    return lambda x: model(x).square().flatten(1).sum(1)


def numbers_keep_their_digits(rank, size):
    """Γ is 1e-8 of ‖ḡ‖², in float32, within ranks and between them."""
    for between in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Conv2d(2, 3, 3, bias=False)
        wrapped = DDP(copy.deepcopy(model))
        one = torch.randn(1, 2, 8, 8)
        x = (
            one
            + 3e-5 * torch.randn(4 * size, 2, 8, 8)
            + 3e-5 * between * torch.arange(size).repeat_interleave(4).view(-1, 1, 1, 1)
        )

        double = copy.deepcopy(model).double()
        with bootgrad.record(double) as rec:
            values = double(x.double()).square().flatten(1).sum(1)
        exact = float(rec.backward(values).covariance_trace)
        reg = bootgrad.GradientRegularizer(wrapped, reg1=1e-3)
        report = reg.backward(squares(wrapped), x[4 * rank : 4 * rank + 4])
        assert exact < 1e-6 * float(report.sq_mean_norm)
        assert abs(float(report.covariance_trace) - exact) < 1e-3 * exact
        assert abs(float(report.reg1) - exact) < 1e-3 * exact


def plain_steps_between(rank, size):
    """Steps of DistributedDataParallel itself before and after."""
    x, y, rows = batch(size)
    n = min(SPLITS[size])  # it averages over ranks, which is the mean for parts of one size
    model, wrapped = pair(find_unused_parameters=True)
    reg = regularizer(wrapped, "zero")
    parts = torch.cat([x[row][:n] for row in rows]), torch.cat([y[row][:n] for row in rows])
    own = slice(n * rank, n * rank + n)
    for kind in ("plain", "recorded", "plain", "penalized", "plain"):
        model.zero_grad()
        wrapped.zero_grad()
        if kind == "penalized":
            regularizer(model, "zero").backward(losses_of(model), *parts)
            reg.backward(losses_of(wrapped), parts[0][own], parts[1][own])
        else:
            losses_of(model)(*parts).mean().backward()
            if kind == "recorded":
                with bootgrad.record(wrapped) as rec:
                    losses = losses_of(wrapped)(parts[0][own], parts[1][own])
                rec.backward(losses)
            else:
                losses_of(wrapped)(parts[0][own], parts[1][own]).mean().backward()
        same_gradients(wrapped, model)


class Counting(nn.Module):
    """Adds to a buffer, unlike on each rank, in every forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.layer(x)


def buffers_come_from_rank_0(rank, size):
    """As without this library, once a step, before its first forward pass."""
    x, y, rows = batch(size)
    own = rows[rank]
    first, second = (len(range(*rows[r].indices(len(x)))) for r in (0, rank))
    _, wrapped = pair(Counting)
    reg = regularizer(wrapped, "zero", method="finite_difference")
    for step in range(3):
        reg.backward(losses_of(wrapped), x[own], y[own])
        assert float(wrapped.module.seen) == step * first + second


def collectives_of_a_step(rank, size):
    """How often ranks wait for each other, beside plain steps' once."""
    x, y, rows = batch(size)
    own, calls = rows[rank], []
    former = bootgrad.distributed.dist.all_reduce

    def counted(*args, **options):
        calls.append(args[0].numel())
        return former(*args, **options)

    bootgrad.distributed.dist.all_reduce = counted
    try:
        counts = {}
        _, wrapped = pair()
        with bootgrad.record(wrapped) as rec:
            losses = losses_of(wrapped)(x[own], y[own])
        rec.backward(losses)
        counts["statistics"] = len(calls)
        for center in CENTERS:
            reg = regularizer(wrapped, CENTERS[center])
            reg.backward(losses_of(wrapped), x[own], y[own])
            calls.clear()
            reg.backward(losses_of(wrapped), x[own], y[own])
            counts[center] = len(calls)
            reg = regularizer(wrapped, CENTERS[center], reg2=0.0)
            calls.clear()
            reg.backward(losses_of(wrapped), x[own], y[own])
            reg.backward(losses_of(wrapped), x[own], y[own])
            counts[center, "reg1"] = len(calls)
    finally:
        bootgrad.distributed.dist.all_reduce = former
    return counts
