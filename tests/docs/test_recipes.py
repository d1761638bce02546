"""What the recipes say is so: their numbers against plain autograd, and what they print against what stands on the page."""

import contextlib
import copy
import functools
import io
import os
import re
import tempfile
from itertools import zip_longest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.monitoring.writers import read_jsonl

from .test_blocks import ROOT, blocks, run

RECIPES = ROOT / "docs/recipes"
PAGES = sorted(page.stem for page in RECIPES.glob("*.md") if page.stem != "index")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@functools.cache
def ran(page: str) -> tuple[dict, str]:
    """What a recipe defines, and what it prints; it runs in an empty folder."""
    printed, before = io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)
        try:
            names = run(RECIPES / f"{page}.md")
        finally:
            os.chdir(before)
    return names, printed.getvalue()


def cross_entropy_rows(model, x, y):
    """(B, P) gradients of the samples' losses by torch.func, differentiable by the model's parameters."""
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return torch.cat([g.flatten(1) for g in rows.values()], dim=1)


def in_float64(model, x, y):
    return cross_entropy_rows(copy.deepcopy(model).double(), x.double(), y).detach()


def trace_of(rows):
    return (rows - rows.mean(0)).square().sum(1).mean()


def flat(by_name):
    return torch.cat([t.flatten() for t in by_name.values()]).double()


def recorded(model, x, y, create_graph=False):
    with bootgrad.record(model) as rec:
        losses = F.cross_entropy(model(x), y, reduction="none")
    return rec.per_sample_gradients(losses, create_graph=create_graph)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_shows(page):
    shown = "".join(block for _, block in blocks(RECIPES / f"{page}.md", "text"))
    _, printed = ran(page)
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", printed).split()
    for line, now in zip_longest(shown.splitlines(), printed.splitlines()):
        numbers, found = (list(map(float, NUMBER.findall(text))) for text in (line, now))
        assert found == pytest.approx(numbers, rel=0.3, abs=0.05), f"{line!r} was printed as {now!r}"


def test_the_index_lists_each_page_once():
    listed = re.findall(r"^\| \[.*\]\((.+)\.md\) \|", (RECIPES / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_all_its_parts(page):
    text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
    parts = re.findall(r"^\*\*(.+?)\.\*\*", text, re.MULTILINE)
    assert [p for p in parts if p in ("What to see", "Pitfalls", "Cost", "Source")] == parts[-4:]
    assert "README.md#what-it-costs" in text and "arxiv.org/abs/" in text
    cost = text[text.index("**Cost.**") : text.index("**Source.**")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for ratio in re.findall(r"\b\d\.\d\d\b", cost):  # none of our own
        assert re.search(rf"\b{re.escape(ratio)}\b", readme), ratio


def test_the_noise_scale_is_found_where_the_plug_in_ratio_is_not():
    names, _ = ran("batch-size")
    rows = in_float64(names["model"], names["x"], names["y"])
    true = float(trace_of(rows) / rows.mean(0).square().sum())
    assert names["true"] == pytest.approx(true, rel=1e-3)
    for B, ratio in names["plug_in"].items():
        assert ratio < 1.2 * B and ratio < 0.6 * true
    assert names["averaged"][32] == pytest.approx(true, rel=0.4)
    assert names["averaged"][128] == pytest.approx(true, rel=0.2)


def test_large_gradients_are_of_wrong_labels():
    names, _ = ran("hard-samples")
    rows = in_float64(names["model"], names["x"], names["y"])
    torch.testing.assert_close(names["norms"].double(), rows.norm(dim=1), rtol=1e-4, atol=1e-6)
    outputs = names["model"](names["x"]).detach().requires_grad_()
    (by_outputs,) = torch.autograd.grad(F.cross_entropy(outputs, names["y"], reduction="sum"), outputs)
    torch.testing.assert_close(names["errors"], by_outputs)
    assert int(names["flipped"].sum()) == 180 == int((names["y"] != names["true_labels"]).sum())
    precision = names["precision"]
    assert precision["GraNd, untrained"] < 0.2
    assert min(precision["GraNd"], precision["EL2N"], precision["loss"]) > 0.85


def test_importance_sampling_lowers_the_variance_and_not_the_mean():
    names, _ = ran("importance-sampling")
    model, x, y, B, N = (names[name] for name in ("model", "x", "y", "B", "N"))
    before = copy.deepcopy(model)
    with torch.no_grad():  # the page's last step undone
        for p, now in zip(before.parameters(), model.parameters(), strict=True):
            p += 0.1 * names["optimizer"].state[now]["momentum_buffer"]
    rows = in_float64(before, x, y)
    norms, mean = rows.norm(dim=1), rows.mean(0)
    for name, p in names["probabilities"].items():
        estimates = rows / (N * p.double()[:, None])  # with probability p each
        torch.testing.assert_close(p.double() @ estimates, mean, rtol=1e-4, atol=1e-7)
        variance = float(p.double() @ (estimates - mean).square().sum(1)) / B
        assert names["variance"][name] == pytest.approx(variance, rel=1e-2)
        assert names["measured"][name] == pytest.approx(variance, rel=0.25)
    variance = names["variance"]
    assert variance["uniform"] == pytest.approx(float(trace_of(rows)) / B, rel=1e-2)
    assert variance["norms"] == pytest.approx(float(norms.mean() ** 2 - mean.square().sum()) / B, rel=1e-2)
    assert variance["norms"] < 0.2 * variance["uniform"]
    assert variance["the same, a tenth uniform"] < 0.7 * variance["uniform"]
    assert float(1 / (N * names["probabilities"]["the same, a tenth uniform"]).min()) <= 10.001
    drawn = names["rows"]
    weighted = names["weights"].double() @ rows[drawn]
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(flat(grads), weighted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(names["old"][drawn].double(), norms[drawn], rtol=1e-3, atol=1e-6)


def test_private_sums_are_clipped_and_noise_is_added_once():
    names, _ = ran("private")
    model, x, y, B, C = (names[name] for name in ("model", "x_train", "y_train", "B", "C"))
    assert names["share"] == 1.0 and names["accuracy"] > 0.7

    def clipped(chosen):
        rows = in_float64(model, x[chosen], y[chosen])
        return (rows * (C / rows.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0), rows.norm(dim=1)

    expected, norms = clipped(slice(0, B))
    sums, share = names["clipped_sum"](x[:B], y[:B])
    torch.testing.assert_close(flat(sums), expected, rtol=1e-3, atol=1e-5)
    assert share == pytest.approx(float((norms > C).double().mean())) and 0 < share < 1
    generator = torch.get_rng_state()
    expected, _ = clipped(torch.rand(len(x)) < B / len(x))
    torch.set_rng_state(generator)
    names["private_step"]()
    noise = flat({name: p.grad for name, p in model.named_parameters()}) - expected / B
    assert float(noise.std()) == pytest.approx(names["sigma"] * C / B, rel=0.06)
    assert abs(float(noise.mean())) < 5 * float(noise.std()) / len(noise) ** 0.5


def test_gaps_between_domains_and_their_gradients_are_those_of_autograd():
    names, _ = ran("domains")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.randint(2, (11,))
    domains, parameters = [slice(0, 5), slice(5, 11)], list(model.parameters())
    sizes, zeros = [p.numel() for p in parameters], dict(allow_unused=True, materialize_grads=True)

    def variance_gap(rows):
        last = [rows[d, sum(sizes[:2]) :].var(0) for d in domains]
        return (last[0] - last[1]).square().sum() / 4

    def trace_gap(rows):
        logs = [[trace_of(part).log() for part in rows[d].split(sizes, dim=1)] for d in domains]
        return sum((a - b).square() / 2 for a, b in zip(*logs, strict=True))

    for name, module, reference in (("variance_gap", model[2], variance_gap), ("trace_gap", model, trace_gap)):
        with bootgrad.record(module) as rec:
            losses = F.cross_entropy(model(x), y, reduction="none")
        gap = names[name](rec.per_sample_gradients(losses, create_graph=True), domains)
        expected = reference(cross_entropy_rows(model, x, y))
        torch.testing.assert_close(gap, expected)
        for found, by_autograd in zip(
            *(torch.autograd.grad(v, parameters, **zeros) for v in (gap, expected)), strict=True
        ):
            torch.testing.assert_close(found, by_autograd)

    results = names["results"]
    for name, strength in (("variances, last layer", 1000.0), ("traces, all layers", 1.0)):
        (plain, plain_gap), (strong, gap) = results[name, 0.0], results[name, strength]
        assert gap < 0.1 * plain_gap
        assert plain[0] > 0.85 and plain[2] < 0.2  # goes by colour
        assert plain[2] + 0.1 < strong[2] < 0.75 and strong[0] < plain[0]


def test_influence_finds_what_was_taught_wrongly():
    names, _ = ran("influence")
    model, x, y = (names[name] for name in ("model", "x", "y"))
    rows = in_float64(model, x, y)
    both = torch.cat([rows[1000:1100], rows[:1000]])
    torch.testing.assert_close(names["gram"].double(), both @ both.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(names["predicted"].double(), -0.01 * rows[:200] @ rows[names["j"]], rtol=1e-3, atol=1e-6)
    harmful, large = names["precision"].values()
    assert harmful > 0.6 and large < 0.3
    assert names["correlation"] > 0.95 and names["agree"] > 0.9


def test_the_kernel_is_that_of_the_jacobian():
    names, _ = ran("ntk")

    def kernel(model):
        parameters = {name: p.detach().double() for name, p in model.named_parameters()}

        def outputs(parameters):
            return torch.func.functional_call(model, parameters, (names["x"].double(),))

        jacobian = torch.func.jacrev(outputs)(parameters)  # {name: (B, outputs, *shape)}
        rows = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)
        return torch.einsum("icp,jcp->ij", rows, rows)

    before = copy.deepcopy(names["network"])
    with torch.no_grad():  # the page's step undone
        for p, now in zip(before.parameters(), names["network"].parameters(), strict=True):
            p += names["lr"] * now.grad
    torch.testing.assert_close(names["K"].double(), kernel(before), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["exact"].double(), kernel(names["classifier"]), rtol=1e-4, atol=1e-4)
    assert names["error"] < 0.01
    assert names["errors"][16] < names["errors"][1] < 0.3


def test_penalties_have_the_gradients_of_autograd():
    names, _ = ran("gradient-penalty")
    model, (x, y), tiny = names["model"], names["batch"], names["TINY"]
    rows = cross_entropy_rows(model, x, y)
    norms, mean = (rows.square().sum(1) + tiny).sqrt(), rows.mean(0)
    norm_of_mean = (mean.square().sum() + tiny).sqrt()
    expected = {
        "mean of norms": norms.mean(),
        "variance of norms": norms.var(correction=0),
        "1 − cosine with the mean": 1 - (rows @ mean / (norms * norm_of_mean)).mean(),
        "norm of the mean": norm_of_mean,
    }
    assert expected.keys() == names["penalties"].keys()
    G = recorded(model, x, y, create_graph=True)
    for name, penalty in expected.items():
        torch.testing.assert_close(names["penalties"][name](G), penalty)
        reference = torch.autograd.grad(penalty, names["parameters"], retain_graph=True)
        for g, e in zip(names["gradients"][name], reference, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-10)  # parameters were moved, and back to rounding
        slope, by_differences = names["slopes"][name]
        assert slope == pytest.approx(by_differences, rel=1e-5)
    trained = names["trained"]
    assert trained[0.02][1] < trained[0.0][1]


def test_rates_of_layers_are_their_shares_of_signal():
    names, _ = ran("layer-learning-rates")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.3)
    rates = names["LayerRates"](model, optimizer, 0.3, warmup=2)
    traces, sq_norms, sizes = 0.0, 0.0, [p.numel() for p in model.parameters()]
    for step, weight in enumerate((0.95, 1.0)):  # with a decay of 0.95
        assert [group["lr"] for group in optimizer.param_groups] == [0.3] * 4
        x, y = names["x"][step:900:9], names["y"][step:900:9]
        with bootgrad.record(model) as rec:
            losses = F.cross_entropy(model(x), y, reduction="none")
        rates.update(rec.backward(losses))
        parts = in_float64(model, x, y).split(sizes, dim=1)
        S = torch.stack([part.var(0).sum() for part in parts])
        G2 = torch.stack([part.mean(0).square().sum() for part in parts]) - S / 100
        traces, sq_norms = traces + weight * S, sq_norms + weight * G2
    expected = 0.3 * sq_norms / (sq_norms + traces / 100)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected.tolist(), rel=1e-3)
    assert names["LayerRates"].signal(bootgrad.NoiseScale(), 100) == 0.0

    together = names["LayerRates"](model, optimizer, 0.3, together=True, warmup=2)
    for _ in range(2):
        with bootgrad.record(model) as rec:
            losses = F.cross_entropy(model(x), y, reduction="none")
        together.update(rec.backward(losses))
    S = sum(part.var(0).sum() for part in parts)
    G2 = sum(part.mean(0).square().sum() for part in parts) - S / 100
    expected = 0.3 * float(G2 / (G2 + S / 100))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 4, rel=1e-3)

    losses = names["losses"]
    for how in ("by layer", "together"):
        assert losses[1.0, how] < losses[1.0, "plain"] and losses[0.3, how] > losses[0.3, "plain"]
    assert losses[1.0, "by layer"] == pytest.approx(losses[1.0, "together"], rel=0.2)


def test_the_criteria_for_stopping_are_what_they_are_said_to_be():
    names, _ = ran("early-stopping")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    x, y = names["digits"][:300], torch.tensor(names["labels"][:300])
    rows, N = in_float64(model, x, y), names["N"]
    mean, variance = rows.mean(0), rows.var(0)
    varies = variance > 0
    assert 0 < int(varies.sum()) < len(varies)
    G = recorded(model, x, y)
    by_coordinates = 1 - N * float((mean[varies].square() / variance[varies]).mean())
    assert names["by_coordinates"](G) == pytest.approx(by_coordinates, rel=1e-3)
    assert names["by_trace"](G) == pytest.approx(1 - N * float(mean.square().sum() / variance.sum()), rel=1e-3)
    for wrong, outcome in names["outcomes"].items():
        (best, best_loss), (coordinates, loss), (trace, trace_loss), (_, end) = outcome.values()
        assert trace < coordinates < best and best_loss < loss < trace_loss
        assert (loss < end) == (wrong > 0) and trace_loss > 0.95 * end


def test_a_training_that_is_watched_is_the_same():
    names, _ = ran("monitoring-only")
    assert names["difference"] < 1e-4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    drawn = torch.randint(len(names["x"]), (64,))
    rows = in_float64(model, names["x"][drawn], names["y"][drawn])
    step, _, trace, _, largest = names["log"][0]
    assert step == 0 and trace == pytest.approx(float(trace_of(rows)), rel=1e-3)
    assert largest == pytest.approx(float(rows.square().sum(1).max()), rel=1e-3)
    traces = [row[2] for row in names["log"]]
    assert traces[0] < max(traces) > traces[-1]


def test_pixels_and_tokens_have_the_gradients_of_each_sample_by_itself(monkeypatch):
    names, _ = ran("dense-and-sequences")
    unet, plain = copy.deepcopy(names["unet"]).double(), names["Reader"]().double()
    plain.load_state_dict(names["reader"].state_dict())
    reader = bootgrad.replace_rnn(copy.deepcopy(plain))
    x, masks = names["x"][:6].double(), names["masks"][:6].clone()
    masks[0, :3] = names["IGNORED"]
    counted = (masks != names["IGNORED"]).flatten(1).sum(1)
    assert len(counted.unique()) > 3 and counted.max() < 64
    parameters = dict(plain.named_parameters())
    _, _, lengths = sequences = names["batch_of"](range(6))
    assert len(lengths.unique()) > 3

    def loss_of_sequence(parameters, places):
        """Of torch's own kernel, on a sequence as it is, without padding."""
        logits = torch.func.functional_call(plain, parameters, (places[None, :-1],))
        return F.cross_entropy(logits[0], places[1:])

    rows = [torch.func.grad(loss_of_sequence)(parameters, places) for places in names["places"][:6]]
    of_sequences = torch.stack([flat(row) for row in rows])
    unpacked = (*sequences[:2], None)
    monkeypatch.setitem(names, "unet", unet)
    monkeypatch.setitem(names, "reader", reader)
    for model, losses_of, batch, expected in (
        (unet, names["losses_of_images"], (x, masks), cross_entropy_rows(unet, x, masks)),
        (reader, names["losses_of_sequences"], sequences, of_sequences),
        (reader, names["losses_of_sequences"], unpacked, of_sequences),
    ):
        with bootgrad.record(model) as rec:
            losses = losses_of(*batch)
        G = rec.per_sample_gradients(losses, create_graph=True)
        found = torch.cat([g.flatten(1) for g in G.materialize().values()], dim=1)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(G.sq_norms(), expected.square().sum(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(G.covariance_trace(), trace_of(expected), rtol=1e-9, atol=1e-12)
        if model is unet:  # of these torch.func has second derivatives, too
            ours = torch.autograd.grad(bootgrad.reg1(G), list(unet.parameters()))
            reference = torch.autograd.grad(trace_of(expected), list(unet.parameters()))
            for g, e in zip(ours, reference, strict=True):
                torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-12)

    correlations = {}
    for name, statistics in names["found"].items():
        norms = statistics.sq_norms.sqrt()
        correlations[name] = float(torch.corrcoef(torch.stack([norms, names["lengths"].float()]))[0, 1])
    own, padded, total = correlations.values()
    assert own < -0.5 and padded == pytest.approx(total, abs=1e-3) and padded > 0.2


def test_an_interrupted_script_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    names, shown = ran("training-script")
    evaluate, epochs = names["evaluate"], []

    def interrupted(model, loader):
        epochs.append(model)
        if len(epochs) == 3:  # the third epoch's steps are taken, and it is not saved
            raise KeyboardInterrupt
        return evaluate(model, loader)

    with contextlib.redirect_stdout(io.StringIO()), monkeypatch.context() as patched:
        patched.setitem(names, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            names["train"](tmp_path / "run")
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 2 and not torch.equal(kept["model"]["0.weight"], epochs[-1].state_dict()["0.weight"])

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        resumed = names["train"](tmp_path / "run")
    assert printed.getvalue().splitlines() == shown.splitlines()[2:]
    for name, p in names["model"].state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name
    steps = names["EPOCHS"] * (1437 // names["BATCH"])
    seen = read_jsonl(tmp_path / "run/monitor.jsonl")
    assert [row["step"] for row in seen] == list(range(0, steps, 5))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    names, _ = ran("training-script")
    path = tmp_path / "checkpoint.pt"
    names["save"](path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        names["save"](path, {"epoch": lambda: 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
