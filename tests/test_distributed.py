"""Ranks that train a model together: gradients, statistics and reports are those of one process on the batch of all."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel as DDP

import bootgrad
import bootgrad.methods.random_signs
import bootgrad.steps

from .methods.steps import CENTERS, SIGN_OPTIONS, Smooth, flat, losses_of, regularizer, relative
from .ranks import together

close = torch.testing.assert_close
FIELDS = ("loss", "reg1", "reg2", "covariance_trace", "mean_sq_norm", "sq_mean_norm", "batch_size", "noise_scale")
BATCH_MEAN = CENTERS["batch_mean"]
PENALTIES = {"both": {}, "reg1": {"reg2": 0.0}, "reg2": {"reg1": 0.0}}
SPLITS = {2: [5, 3], 4: [3, 1, 5, 2]}


class Branches(nn.Module):
    """Two layers of which a rank goes through one, and one that none goes through."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        return torch.tanh((self.a if x[0, 0] > 0 else self.b)(x))


def batch(size, dtype=torch.float64):
    """A batch, (B, 3) and (B,), and which rows of it each rank has."""
    split = SPLITS[size]
    x = torch.randn(sum(split), 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    ends = list(itertools.accumulate(split, initial=0))
    return x, torch.arange(sum(split)) % 2, [slice(a, b) for a, b in itertools.pairwise(ends)]


def pair(kind=Smooth, dtype=torch.float64, **options):
    """A model, and the same one wrapped."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    return model, DDP(copy.deepcopy(model), **options)


def same_report(ours, expected, rtol=1e-9):
    for name in FIELDS:
        close(getattr(ours, name), getattr(expected, name), rtol=rtol, atol=1e-12, equal_nan=True)
    assert ours.method == expected.method and ours.notes == expected.notes


def same_gradients(wrapped, model, rtol=1e-9, atol=1e-12):
    for p, q in zip(wrapped.module.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad, rtol=rtol, atol=atol)


def same_steps(whole, ours, size, own, parts=None, rtol=1e-9, atol=1e-12, options=()):
    """Three steps of a regularizer on one process, and of one on ranks, by micro-batches of sizes that each rank has."""
    x, y, _ = batch(size)
    for step in range(3):
        x = x.roll(1, 0) * (1 + step / 4)
        whole.model.zero_grad()
        ours.model.zero_grad()
        expected = whole.backward(losses_of(whole.model), x, y)
        if parts is None:
            report = ours.backward(losses_of(ours.model), x[own], y[own])
        else:
            with ours.accumulate() as block:
                for micro in zip(x[own].split(parts), y[own].split(parts), strict=True):
                    ours.backward(losses_of(ours.model), *micro)
            report = block.report
        same_gradients(ours.model, whole.model, rtol, atol)
        same_report(report, expected, rtol)
    close(ours.state_dict(), whole.state_dict(), rtol=rtol, atol=1e-12)


# What each rank does


def statistics_of_a_backward_pass(rank, size):
    x, y, rows = batch(size)
    own = rows[rank]
    center = torch.randn(26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.arange(len(x), dtype=torch.float64)
    for reduction, about in itertools.product(("mean", "sum", weights), (None, center)):
        model, wrapped = pair()
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


def statistics_of_micro_batches(rank, size):
    x, y, rows = batch(size)
    own = rows[rank]
    center = torch.randn(26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for about in (None, center):
        model, wrapped = pair()
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


def exact_penalties(rank, size):
    x, y, rows = batch(size)
    for center, penalties in itertools.product(CENTERS.values(), PENALTIES.values()):
        for parts in (None, 2):
            model, wrapped = pair()
            whole, ours = (regularizer(m, copy.deepcopy(center), **penalties) for m in (model, wrapped))
            same_steps(whole, ours, size, rows[rank], parts)


def other_penalties(rank, size):
    x, y, rows = batch(size)
    for center in CENTERS.values():
        for options in ({"method": "finite_difference", "epsilon": 1e-6}, {"every": 2}):
            model, wrapped = pair()
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
    import bootgrad.distributed

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


# A rank that fails


def raised(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def failures(rank, size):
    """In every place that one rank can fail in; afterwards all go on."""
    x, y, rows = batch(size)
    own, found = rows[rank], {}
    model, wrapped = pair()
    bad = torch.tensor(torch.nan if rank == 1 else 1.0)

    def spoiled(x, y):
        return losses_of(wrapped)(x, y) * bad

    def broken(x, y):
        if rank == 1:
            raise KeyError("no such file")
        return losses_of(wrapped)(x, y)

    def statistics():
        with bootgrad.record(wrapped) as rec:
            losses = spoiled(x[own], y[own])
        rec.backward(losses)

    def block(function, penalties):
        reg = regularizer(wrapped, **({"center": BATCH_MEAN} | penalties))
        with reg.accumulate():
            reg.backward(losses_of(wrapped), x[own], y[own])
            reg.backward(function, x[own], y[own])

    def between():
        reg = regularizer(wrapped, BATCH_MEAN)
        with reg.accumulate():
            reg.backward(losses_of(wrapped), x[own], y[own])
            if rank == 1:
                raise KeyError("no such file")

    def second_sweep():
        """Ranks have met once for the mean gradient, and one fails before they meet again."""
        reg, calls = regularizer(wrapped, BATCH_MEAN), []

        def changing(x, y):
            calls.append(len(x))
            return losses_of(wrapped)(x, y) * (1.0 if rank != 1 or len(calls) < 3 else 2.0)

        with reg.accumulate():
            reg.backward(changing, x[own], y[own])
            reg.backward(changing, x[own], y[own])

    steps = {
        "statistics": statistics,
        "losses": lambda: regularizer(wrapped, BATCH_MEAN).backward(spoiled, x[own], y[own]),
        "one round": lambda: regularizer(wrapped, "zero", reg2=0.0).backward(spoiled, x[own], y[own]),
        "function": lambda: regularizer(wrapped, BATCH_MEAN).backward(broken, x[own], y[own]),
        "block": lambda: block(broken, {}),
        "block, plain": lambda: block(spoiled, {"center": "zero", "reg2": 0.0}),
        "between": between,
        "second sweep": second_sweep,
    }
    for name, step in steps.items():
        wrapped.zero_grad()
        found[name] = raised(step)
        assert all(p.grad is None for p in wrapped.parameters()), name
        reg = regularizer(wrapped, BATCH_MEAN)  # and all is in step
        model.zero_grad()
        regularizer(model, BATCH_MEAN).backward(losses_of(model), x, y)
        reg.backward(losses_of(wrapped), x[own], y[own])
        same_gradients(wrapped, model)
    return found


def refusals(rank, size):
    """What would not be the batch's."""
    x, y, rows = batch(size)
    own = rows[rank]
    _, wrapped = pair()
    found = {}

    def no_sync():
        with wrapped.no_sync():
            regularizer(wrapped, "zero").backward(losses_of(wrapped), x[own], y[own])

    def rows_with_a_graph():
        with bootgrad.record(wrapped) as rec:
            losses = losses_of(wrapped)(x[own], y[own])
        rec.per_sample_gradients(losses, create_graph=True)

    def hooked():
        _, hooked = pair()
        hooked.register_comm_hook(None, lambda state, bucket: bucket.buffer())
        bootgrad.record(hooked)

    def ignoring():
        model, _ = pair()
        DDP._set_params_and_buffers_to_ignore_for_model(model, ["layers.0.bias"])
        bootgrad.record(DDP(model))

    def sparse():
        model = DDP(nn.EmbeddingBag(5, 2, sparse=True, mode="sum").double())
        reg = regularizer(model, "zero", reg2=0.0, method="random_signs", derivative="finite_difference")
        reg.backward(lambda x: model(x).square().sum(1), torch.zeros(3, 2, dtype=torch.long))

    found["no_sync"] = raised(no_sync)
    found["graph"] = raised(rows_with_a_graph)
    found["hook"] = raised(hooked)
    found["ignored"] = raised(ignoring)
    found["sparse"] = raised(sparse)
    found["static"] = raised(lambda: bootgrad.record(pair(static_graph=True)[1]))
    found["inside"] = raised(lambda: bootgrad.record(nn.Sequential(wrapped, nn.Linear(2, 2))))
    found["beside"] = raised(lambda: bootgrad.record(wrapped, nn.Linear(2, 2)))
    with bootgrad.record(wrapped) as rec:  # rows of its own samples are the rank's own
        losses = losses_of(wrapped)(x[own], y[own])
    assert rec.per_sample_gradients(losses).batch_size == SPLITS[size][rank]
    return found


ANY_NUMBER = (
    statistics_of_a_backward_pass,
    statistics_of_micro_batches,
    exact_penalties,
    other_penalties,
    without_statistics,
    losses_in_place_of_a_function,
    what_some_ranks_do_not_reach,
    half_precision_and_a_scaler,
    each_rank_draws_its_own_signs,
    numbers_keep_their_digits,
    plain_steps_between,
    buffers_come_from_rank_0,
    failures,
)
TWO = (
    *ANY_NUMBER,
    fractions_averaged_over_all_subsets,
    random_signs_averaged_over_all_signs,
    collectives_of_a_step,
    refusals,
)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two ranks found, by case."""
    return together(2, tmp_path_factory.mktemp("ranks") / "meeting", *TWO)


def values_of(found, case):
    """What each rank found, none of which is an error."""
    errors = [value for value in found[case.__name__] if isinstance(value, str)]
    assert not errors, errors[0]
    return found[case.__name__]


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.__name__)
def test_two_ranks_are_one_process(of_two, case):
    values_of(of_two, case)


@pytest.mark.slow
def test_four_ranks_are_one_process(tmp_path):
    found = together(4, tmp_path / "meeting", *ANY_NUMBER)
    for case in ANY_NUMBER:
        values_of(found, case)
    check_what_was_told(found)


def test_what_ranks_find_of_each_other(of_two):
    check_what_was_told(of_two)


def check_what_was_told(found):
    """Parameters are the same on all, signs are not, and each knows who failed."""
    first, *others = values_of(found, half_precision_and_a_scaler)
    assert all(torch.equal(first, other) for other in others)
    signs = values_of(found, each_rank_draws_its_own_signs)
    assert len(set(map(tuple, signs))) == len(signs)
    at_rank_1 = values_of(found, failures)[1]
    assert {kind for kind, _ in at_rank_1.values()} == {"ArgumentError", "KeyError"}
    for rank, of_rank in enumerate(values_of(found, failures)):
        for place, (kind, text) in of_rank.items():
            if rank != 1:
                told = ": ".join(at_rank_1[place])
                assert (kind, text) == ("DistributedError", f"rank 1 failed, and with it this step on all: {told}")


def test_rounds_of_a_step(of_two):
    """One, and one more where a penalty needs the mean gradient of all; of Reg1 alone there are two, the first without center."""
    for counts in values_of(of_two, collectives_of_a_step):
        assert counts == {
            "statistics": 1,
            "batch_mean": 2,
            ("batch_mean", "reg1"): 4,
            "zero": 2,
            ("zero", "reg1"): 2,
            "ema": 2,
            ("ema", "reg1"): 3,
            "window": 2,
            ("window", "reg1"): 3,
        }


def test_what_is_refused(of_two):
    for found in values_of(of_two, refusals):
        assert {kind for kind, _ in found.values()} == {"UnsupportedError"}
        for place, words in {
            "no_sync": "a block of accumulate",
            "graph": "GradientRegularizer",
            "hook": "communication hook",
            "ignored": "ignores, layers.0.bias",
            "sparse": "parameter weight has a sparse gradient",
            "static": "static_graph",
            "inside": "wrap the whole",
            "beside": "wrap all of them",
        }.items():
            assert words in found[place][1]
