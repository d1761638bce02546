"""Models of other libraries, recorded as they are: the numbers of plain autograd, and no trace left of it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import bootgrad
from tests.oracle import Oracle

from .plain import batches, losses_of
from .test_transformers import bert, collated, gpt2, llama, next_token_losses, t5, texts

pytest.importorskip("transformers")


def classes_of(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return F.cross_entropy(logits, torch.arange(len(logits)) % 3, reduction="none")


def decoded(model, inputs):
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits.mT, inputs["labels"], reduction="none").sum(1)


def with_adapters(model, targets, **options):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, **options)
        ).double()
    generator = torch.Generator().manual_seed(2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, by which A has no gradient
            p.data.normal_(generator=generator, std=0.3)
    return adapted


def lightning_module():
    from .test_lightning import Network

    return Network()


MODELS = {
    "gpt2": (gpt2, next_token_losses),
    "llama": (llama, next_token_losses),
    "bert": (lambda: bert("SequenceClassification", num_labels=3), classes_of),
    "t5": (t5, decoded),
    "gpt2 with LoRA": (lambda: with_adapters(gpt2(), ["c_attn"], fan_in_fan_out=True), next_token_losses),
    "llama with LoRA": (lambda: with_adapters(llama(), ["q_proj", "v_proj", "up_proj"]), next_token_losses),
    "llama with DoRA": (lambda: with_adapters(llama(), ["q_proj", "up_proj"], use_dora=True), next_token_losses),
}


def traces_of(model):
    """What a recording could leave on a model: classes, attributes, hooks, keys of the state."""
    modules = {
        name: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    }
    parameters = {name: (type(p), p.requires_grad, sorted(vars(p))) for name, p in model.named_parameters()}
    return modules, parameters, list(model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_traces_are_those_of_plain_autograd(name):
    make, losses = MODELS[name]
    model = make().train()
    inputs = collated(texts(5))
    oracle = Oracle(model, lambda: losses(model, inputs))
    before, state = traces_of(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = losses(model, inputs)
    with bootgrad.record(model) as rec:
        found = losses(model, inputs)
    statistics = rec.backward(found)
    torch.testing.assert_close(found.detach(), plain, rtol=1e-9, atol=1e-9)
    expected = oracle.matrix.detach().square().sum(1)
    torch.testing.assert_close(statistics.sq_norms, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(statistics.covariance_trace, oracle.reg1().detach(), rtol=1e-6, atol=1e-9)
    grads = oracle.gradient(oracle.losses.mean())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert list(statistics.per_parameter) == trained
    for n, p in model.named_parameters():
        if n in trained:
            torch.testing.assert_close(p.grad, grads[n], rtol=1e-6, atol=1e-9)
        else:
            assert p.grad is None
    if "LoRA" in name:
        assert all("lora_" in n for n in trained)
    assert traces_of(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", ["bert", "gpt2 with LoRA", "llama with DoRA"])
def test_the_penalty_is_that_of_plain_autograd(name):
    make, losses = MODELS[name]
    model = make().train()
    inputs = collated(texts(4))
    oracle = Oracle(model, lambda: losses(model, inputs))
    want = oracle.gradient(oracle.losses.mean() + 0.3 * oracle.reg1())
    before = traces_of(model)
    bootgrad.GradientRegularizer(model, reg1=0.3).backward(lambda inputs: losses(model, inputs), inputs)
    for n, g in want.items():
        torch.testing.assert_close(model.get_parameter(n).grad, g, rtol=1e-6, atol=1e-9)
    assert traces_of(model) == before


def test_a_lightning_module_is_a_module():
    pytest.importorskip("lightning.pytorch")
    module = lightning_module()
    (x, y), before = batches([6])[0], traces_of(module)
    oracle = Oracle(module, lambda: losses_of(module.model, x, y))
    with bootgrad.record(module) as rec:
        losses = losses_of(module.model, x, y)
    statistics = rec.backward(losses)
    torch.testing.assert_close(statistics.covariance_trace, oracle.reg1().detach())
    assert list(statistics.per_parameter) == [n for n, _ in module.named_parameters()]
    assert traces_of(module) == before
