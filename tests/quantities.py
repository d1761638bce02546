"""Every quantity of one model against the oracle, in float64: functions of a `Case`, for any model and way of use."""

import torch

import bootgrad

from .oracle import Oracle, flat, losses_of, parameters_of, random_like, record

CLOSE = dict(
    rtol=1e-9, atol=1e-10
)  # float64: sums of some hundred terms, and room for what cancels in a penalty's gradient


class Case:
    """A model with inputs, in float64, and what is known of it by the oracle; ``options`` are those of its recordings."""

    def __init__(self, model, inputs, plain=None, seed=None, losses_of=losses_of, **options):
        self.model, self.inputs, self.seed, self.losses_of, self.options = model, inputs, seed, losses_of, options
        self.parameters = parameters_of(model)
        self.oracle = Oracle(model, lambda: self.run(plain))
        self.center = random_like(self.parameters)
        self.flat_center = torch.cat([c.flatten() for c in self.center.values()])

    def run(self, forward=None):
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return self.losses_of((self.model if forward is None else forward)(*self.inputs))

    def record(self, forward=None):
        return record(self.model, lambda: self.run(forward), **self.options)

    def matrix(self, create_graph=False):
        rec, losses = self.record()
        return rec.per_sample_gradients(losses, create_graph=create_graph)


def check(ours, expected):
    torch.testing.assert_close(ours, expected, **CLOSE)


def check_gradients(case, ours, expected):
    for (name, p), g in zip(case.parameters.items(), ours, strict=True):
        g = torch.zeros_like(p) if g is None else g
        torch.testing.assert_close(g, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def norms(case, forward=None):
    rec, losses = case.record(forward)
    stats = rec.backward(losses)
    D = case.oracle.matrix
    check(stats.sq_norms, D.square().sum(1))
    check(stats.covariance_trace, (D - D.mean(0)).square().sum(1).mean())
    for name, rows in case.oracle.rows.items():
        check(stats.per_parameter[name].sq_norms, rows.reshape(len(rows), -1).square().sum(1))
        check(case.parameters[name].grad, rows.mean(0))


def deviation(case):
    D, c = case.oracle.matrix, case.flat_center
    rec, losses = case.record()
    check(rec.backward(losses, center=case.center).deviation_sq_norms, (D - c).square().sum(1))
    G = case.matrix()
    check(G.deviation_sq_norms(c), (D - c).square().sum(1))
    check(G.deviation_sq_norms(), (D - D.mean(0)).square().sum(1))
    check(G.covariance_trace(), (D - D.mean(0)).square().sum(1).mean())


def products(case):
    D, G = case.oracle.matrix, case.matrix()
    check(G @ case.center, D @ case.flat_center)
    check(G.gram(), D @ D.T)
    check(G[[2, 0]].sq_norms(), D[[2, 0]].square().sum(1))


def transposed_products(case):
    G, w = case.matrix(), torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    check(torch.cat([t.flatten() for t in (G.T @ w).values()]), w @ case.oracle.matrix)
    check(torch.cat([t.flatten() for t in G.mean().values()]), case.oracle.matrix.mean(0))
    check(flat(G.materialize()), case.oracle.matrix)


def second_order(case):
    oracle, parameters = case.oracle, list(case.parameters.values())
    zero = torch.zeros_like(case.flat_center)
    expected = [oracle.reg1(), oracle.reg1(zero), oracle.reg1(case.flat_center), oracle.reg2(case.flat_center)]
    G = case.matrix(create_graph=True)
    ours = [bootgrad.reg1(G), G.sq_norms().mean(), bootgrad.reg1(G, case.center), bootgrad.reg2(G, case.center)]
    for value, by_oracle in zip(ours, expected, strict=True):
        check(value, by_oracle)
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        check_gradients(case, grads, oracle.gradient(by_oracle))
    for center, value in (("zero", oracle.reg1(zero)), ("batch_mean", oracle.reg1())):
        case.model.zero_grad()
        reg = bootgrad.GradientRegularizer(case.model, reg1=0.5, center=center)
        reg.backward(case.run if not case.options else _recorded_by(reg, case))
        expected = oracle.gradient(oracle.losses.mean() + 0.5 * value)
        check_gradients(case, [p.grad for p in parameters], expected)


def _recorded_by(reg, case):
    with reg.record(**case.options):
        return case.run()


def finite_differences(case):
    oracle = case.oracle
    expected = oracle.gradient(oracle.losses.mean() + 0.1 * oracle.reg1())
    case.model.zero_grad()
    reg = bootgrad.GradientRegularizer(case.model, reg1=0.1, method="finite_difference", epsilon=1e-7)
    reg.backward(case.run)
    scale = max(float(g.norm()) for g in expected.values())
    for name, p in case.parameters.items():
        assert float((p.grad - expected[name]).norm()) <= 1e-4 * scale, name  # rounding over the step
