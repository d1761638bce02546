import copy
import math
import shutil
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bootgrad.errors import ArgumentError, ArgumentTypeError, BootgradWarning, DataError, UnsupportedError
from tests.oracle import Oracle, parameters_of

from .plain import assert_same_parameters

transformers = pytest.importorskip("transformers")
from bootgrad.integrations.transformers import STATE, PerSample, Trainer, _ratio, per_sample_losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def gpt2(dropout=0.0):
    rates = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, **rates)
    return made(transformers.GPT2LMHeadModel, config)


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=16)
    return made(transformers.LlamaForCausalLM, config)


def bert(kind, **options):
    return made(getattr(transformers, f"BertFor{kind}"), transformers.BertConfig(**SMALL, **QUIET, **options))


def t5():
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return made(
        transformers.T5ForConditionalGeneration, transformers.T5Config(vocab_size=32, **sizes, decoder_start_token_id=0)
    )


def made(kind, config):
    torch.manual_seed(0)
    config.use_cache = False
    return kind(config).double()


def texts(number, length=7, seed=1):
    """Samples of several lengths, padded, with the label −100 at padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 32, (number, length), generator=g)
    lengths = torch.randint(2, length + 1, (number,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return [
        {"input_ids": i * m, "attention_mask": m, "labels": torch.where(m == 1, i, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


def with_classes(samples, classes=3):
    return [{**s, "labels": torch.tensor(k % classes)} for k, s in enumerate(samples)]


def collated(samples):
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def options(folder, **others):
    settings = dict(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    settings |= dict(per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.1, optim="sgd")
    settings |= dict(lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, dataloader_pin_memory=False)
    return transformers.TrainingArguments(**(settings | others))


class Seen:
    """What a trainer was given, by optimizer step."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), batches]
        return batches, items


class Ours(Seen, Trainer):
    pass


class Theirs(Seen, transformers.Trainer):
    pass


def next_token_losses(model, inputs, first=0):
    """Σ_t ℓ_it of a causal language model, by the mean number of labels, of which GPT-2's are counted from the ``first`` on."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    sums = F.cross_entropy(logits[:, :-1].mT, inputs["labels"][:, 1:], reduction="none").sum(1)
    return sums * len(sums) / (inputs["labels"][:, first:] != -100).sum()


def reference(model, steps, losses, reg1, lr=0.1, clip=None):
    """A copy after SGD on the mean of all samples' losses + λ₁ Γ, by plain autograd."""
    model, found = copy.deepcopy(model).train(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batches in steps:
        inputs = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
        oracle = Oracle(model, lambda inputs=inputs: losses(model, inputs))
        trace = oracle.reg1()
        for name, g in oracle.gradient(oracle.losses.mean() + reg1 * trace).items():
            parameters_of(model)[name].grad = g
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append((float(oracle.losses.mean().detach()), float(trace.detach())))
    return model, found


LABELS = {
    "gpt2": (gpt2, texts(5)),
    "llama": (llama, texts(5)),
    "masked": (lambda: bert("MaskedLM"), texts(5)),
    "tokens": (lambda: bert("TokenClassification", num_labels=32), texts(5)),
    "classes": (lambda: bert("SequenceClassification", num_labels=3), with_classes(texts(5))),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        [{**s, "labels": torch.tensor(k / 3).double()} for k, s in enumerate(texts(5))],
    ),
    "several": (
        lambda: bert("SequenceClassification", num_labels=2),
        [{**s, "labels": torch.tensor([k % 2, 1]).double()} for k, s in enumerate(texts(5))],
    ),
    "spans": (
        lambda: bert("QuestionAnswering"),
        [
            {k: v for k, v in s.items() if k != "labels"}
            | {"start_positions": torch.tensor(k % 3), "end_positions": torch.tensor(2 * k)}  # one is outside
            for k, s in enumerate(texts(5))
        ],
    ),
    "two_parts": (t5, texts(5)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_samples_losses_have_the_models_own_loss_as_their_mean_and_are_their_own(kind):
    model, samples = LABELS[kind][0](), LABELS[kind][1]
    model.eval()
    inputs = collated(samples)
    with torch.no_grad():
        outputs = model(**inputs)
        losses = per_sample_losses(model, outputs, inputs)
        torch.testing.assert_close(losses.mean(), outputs.loss.double(), rtol=1e-6, atol=1e-7)
        changed = {name: value.clone() for name, value in inputs.items()}
        changed["input_ids"][3] = changed["input_ids"][3].flip(0)
        others = per_sample_losses(model, model(**changed), changed)
    is_same = torch.isclose(losses, others, rtol=1e-6)
    assert is_same.tolist() == [True, True, True, False, True]


def test_losses_of_another_kind_are_refused_by_name():
    model = bert("NextSentencePrediction")
    model.loss_type = "ForObjectDetection"
    with pytest.raises(UnsupportedError, match="BertForNextSentencePrediction has a loss of kind 'ForObjectDetection'"):
        per_sample_losses(model, None, {})


@pytest.mark.parametrize(("accumulated", "clip"), [(1, 0.0), (2, 0.3)])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_language_model_takes_the_steps_of_a_plain_loop(tmp_path, make, accumulated, clip):
    model = make()
    start = copy.deepcopy(model)
    args = options(tmp_path, gradient_accumulation_steps=accumulated, max_grad_norm=clip)
    trainer = Ours(model, args, train_dataset=texts(12), penalties={"reg1": 0.2})
    trainer.train()
    assert [len(batches) for batches in trainer.seen] == ([1, 1, 1] if accumulated == 1 else [2, 1])
    losses = partial(next_token_losses, first=0 if make is gpt2 else 1)
    want, found = reference(start, trainer.seen, losses, 0.2, clip=clip or None)
    assert_same_parameters(model, want, 1e-7)  # Trainer keeps its norms in float32
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in logs] == pytest.approx([loss for loss, _ in found], abs=1e-4)  # rounded by Trainer
    assert [row["bootgrad/covariance_trace"] for row in logs] == pytest.approx([trace for _, trace in found])
    assert [row["bootgrad/reg1"] for row in logs] == pytest.approx([trace for _, trace in found])
    assert trainer.regularizer.step == len(trainer.seen)
    assert float(trainer.report.covariance_trace) == pytest.approx(found[-1][1])


def test_a_classifier_takes_the_steps_of_a_plain_loop(tmp_path):
    model = bert("SequenceClassification", num_labels=3)
    start = copy.deepcopy(model)

    def losses(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return F.cross_entropy(logits, inputs["labels"], reduction="none")

    args = options(tmp_path, gradient_accumulation_steps=2)
    trainer = Ours(model, args, train_dataset=with_classes(texts(11)), penalties={"reg1": 0.2})
    with pytest.warns(BootgradWarning, match="over 2 of them undivided") as caught:
        trainer.train()
    assert len([w for w in caught if w.category is BootgradWarning]) == 1
    assert [sum(len(b["labels"]) for b in batches) for batches in trainer.seen] == [8, 3]
    want, _ = reference(start, trainer.seen, losses, 0.2)
    assert_same_parameters(model, want, 1e-8)


def test_losses_of_ones_own(tmp_path):
    model = gpt2()
    start = copy.deepcopy(model)

    def own(outputs, inputs):
        """Each sequence counts alike."""
        labels = inputs["labels"][:, 1:]
        sums = F.cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none").sum(1)
        return sums / (labels != -100).sum(1)

    args = options(tmp_path, gradient_accumulation_steps=3)
    trainer = Ours(model, args, train_dataset=texts(12), penalties={"reg1": 0.1}, losses=own)
    trainer.train()

    def losses(model, inputs):
        return own(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]), inputs)

    want, _ = reference(start, trainer.seen, losses, 0.1)
    assert_same_parameters(model, want, 1e-8)


@pytest.mark.parametrize(
    "penalties",
    [
        dict(reg1=0.1, reg2=0.1, center={"reg1": "batch_mean", "reg2": "ema"}),
        dict(reg1=0.1, fraction=0.5),
        dict(reg1=0.1, method="random_signs", derivative="finite_difference"),
    ],
    ids=["both", "fraction", "random_signs"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, penalties):
    def run(folder, resume=None):
        model = gpt2(dropout=0.1)
        args = options(folder, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, num_train_epochs=2)
        trainer = Ours(model, args, train_dataset=texts(16), penalties=penalties, statistics=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    assert (tmp_path / "whole/checkpoint-2" / STATE).exists()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "other/checkpoint-2")
    for resume in (str(tmp_path / "whole/checkpoint-2"), True):
        resumed = run(tmp_path / ("other" if resume is True else "third"), resume)
        assert_same_parameters(resumed.model, whole.model, 0)
        assert resumed.regularizer.step == whole.regularizer.step == 4
        assert resumed.monitor.step == 4
        assert resumed.monitor.last.noise_scale == pytest.approx(whole.monitor.last.noise_scale)
        torch.testing.assert_close(resumed.report.loss, whole.report.loss, rtol=0, atol=0)


def test_a_checkpoint_without_state_says_that_penalties_start_anew(tmp_path):
    args = options(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    transformers.Trainer(gpt2(), args, train_dataset=texts(8)).train()
    trainer = Trainer(gpt2(), args, train_dataset=texts(8), penalties={"reg1": 0.1, "center": "ema"})
    with pytest.warns(BootgradWarning, match="start anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.regularizer.step == 1
    (tmp_path / "checkpoint-1" / STATE).write_bytes(b"none")
    with pytest.raises(DataError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("make", [gpt2, lambda: bert("SequenceClassification", num_labels=3)], ids=["gpt2", "bert"])
def test_statistics_leave_the_training_as_it_is(tmp_path, make, accumulated):
    samples = texts(20)
    samples = samples if make is gpt2 else with_classes(samples)
    args = options(tmp_path, gradient_accumulation_steps=accumulated, max_grad_norm=0.5)
    plain, watched = make(), make()
    theirs = Theirs(plain, args, train_dataset=samples)
    theirs.train()
    ours = Ours(watched, args, train_dataset=samples, statistics={"every": 2, "layers": "all"})
    ours.train()
    assert_same_parameters(watched, plain, 1e-7)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (theirs, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    steps = math.ceil(5 / accumulated)
    assert ours.monitor.step == steps
    seen = [row for row in ours.state.log_history if "bootgrad/covariance_trace" in row]
    assert [row["step"] for row in seen] == list(range(1, steps + 1, 2))
    assert all(math.isfinite(row["bootgrad/norm/1"]) for row in seen)


@pytest.mark.parametrize("are_labelled", [True, False])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_what_is_seen_is_of_the_losses_that_are_trained(tmp_path, make, accumulated, are_labelled):
    """By the labels that the trainer has counted, the first of each text among them; of several micro-batches the last."""
    model, samples = make(), texts(8)
    if not are_labelled:  # in the first micro-batch of two, and then all labels are the second's
        samples[:4] = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in samples[:4]]
        samples = samples[:4] * (accumulated - 1) + samples[4:]
    start = copy.deepcopy(model).train()
    args = options(tmp_path, gradient_accumulation_steps=accumulated, max_steps=1, train_sampling_strategy="sequential")
    trainer = Ours(model, args, train_dataset=samples, statistics=1)
    trainer.train()
    (batches,) = trainer.seen
    labels = torch.cat([batch["labels"] for batch in batches])[:, 0 if make is gpt2 else 1 :]
    each = (labels != -100).sum() / len(labels)

    def losses():
        inputs = batches[-1]
        logits = start(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].mT, inputs["labels"][:, 1:], reduction="none").sum(1) / each

    seen, expected = trainer.monitor.last, Oracle(start, losses)
    assert seen.loss == pytest.approx(float(expected.losses.detach().mean()), rel=1e-6)
    assert seen.covariance_trace == pytest.approx(float(expected.reg1().detach()), rel=1e-5)
    if accumulated == 1:
        assert trainer.state.log_history[0]["loss"] == pytest.approx(seen.loss, abs=1e-4)


@pytest.mark.parametrize("options_of", [{"statistics": 2.5}, {"penalties": 0.1}])
def test_options_are_by_name(tmp_path, options_of):
    with pytest.raises(ArgumentTypeError, match="must be options by name"):
        Trainer(gpt2(), options(tmp_path), train_dataset=texts(4), **options_of)


@pytest.mark.parametrize(("strategy", "steps"), [("steps", [1, 3, 5]), ("no", [])])
def test_what_was_seen_is_logged_at_its_own_step_whatever_the_trainers_interval(tmp_path, strategy, steps):
    args = options(tmp_path, logging_steps=3, logging_strategy=strategy)
    trainer = Ours(gpt2(), args, train_dataset=texts(20), statistics=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "bootgrad/covariance_trace" in row]
    assert [row["step"] for row in rows] == steps
    assert [row["step"] for row in rows if "loss" in row] == [step for step in steps if step == 3]


def test_a_trainer_that_averages_between_its_logs_logs_what_it_would(tmp_path):
    class Averages(Ours):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "steps": self.steps}, *args, **kwargs)
            self.steps = 0

    trainer = Averages(gpt2(), options(tmp_path, logging_steps=3, max_steps=6), train_dataset=texts(24), statistics=2)
    trainer.train()
    assert [(row["step"], row["steps"]) for row in trainer.state.log_history if "loss" in row] == [(3, 3), (6, 3)]


def test_autocast_to_bfloat16_is_that_of_the_trainer(tmp_path):
    """Against the regularizer in a loop of one's own; the first step has the same numbers in both."""
    import bootgrad

    model, seen = gpt2().float(), []
    other = copy.deepcopy(model).train()
    model.transformer.h[0].mlp.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    args = options(tmp_path, bf16=True, max_steps=2)
    trainer = Ours(model, args, train_dataset=texts(8), penalties={"reg1": 0.1, "center": "zero"})
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    reg = bootgrad.GradientRegularizer(other, reg1=0.1, center="zero")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for (batch,) in trainer.seen:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            reg.backward(lambda inputs: next_token_losses(other, inputs).float(), batch)
        optimizer.step()
    assert_same_parameters(model, other, 2e-3)


def test_what_a_model_adds_to_its_loss_is_found(tmp_path):
    class More(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs.loss = outputs.loss + 0.1
            return outputs

    model = made(More, gpt2().config)
    for what in (dict(penalties={"reg1": 0.1}), dict(statistics=1)):
        with pytest.raises(UnsupportedError, match="there is more in it"):
            Trainer(model, options(tmp_path, remove_unused_columns=False), train_dataset=texts(4), **what).train()


def positioned(samples):
    """As collators give them that make positions once for all, first of all."""
    inputs = collated(samples)
    return {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None], **inputs}


@pytest.mark.parametrize("what", [dict(penalties={"reg1": 1e-14}), dict(statistics=1)], ids=["penalties", "statistics"])
def test_inputs_that_are_of_no_sample_do_not_count(tmp_path, what):
    plain, ours = llama(), llama()
    args = options(tmp_path, max_steps=2, remove_unused_columns=False, gradient_accumulation_steps=2)
    transformers.Trainer(plain, args, train_dataset=texts(16), data_collator=positioned).train()
    trainer = Trainer(ours, args, train_dataset=texts(16), data_collator=positioned, **what)
    trainer.train()
    assert_same_parameters(ours, plain, 1e-6)
    assert trainer.state.log_history[0]["bootgrad/loss" if "penalties" in what else "loss"] > 0


def test_losses_of_another_number_than_samples_are_refused(tmp_path):
    def halved(outputs, inputs):
        return outputs.logits.mean((1, 2))[:2]

    trainer = Trainer(gpt2(), options(tmp_path), train_dataset=texts(4), penalties={"reg1": 0.1}, losses=halved)
    with pytest.raises(ArgumentError, match="one for each sample, 4 by the inputs; got 2"):
        trainer.train()


def mixtral():
    sizes = dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16)
    router = dict(output_router_logits=True, router_aux_loss_coef=1e-6)
    return made(transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL, **sizes, **router))


@pytest.mark.parametrize("what", [dict(penalties={"reg1": 0.1}), dict(statistics=1)], ids=["penalties", "statistics"])
def test_a_routers_loss_is_refused_however_small(tmp_path, what):
    with pytest.raises(UnsupportedError, match="MixtralForCausalLM adds its aux_loss to the loss"):
        Trainer(mixtral(), options(tmp_path), train_dataset=texts(4), **what).train()


def test_a_class_whose_name_tells_nothing_is_a_language_model_by_its_shapes():
    choices, ids = (
        torch.tensor([0, 2, 1, 1]),
        torch.randint(1, 32, (4, 3, 7), generator=torch.Generator().manual_seed(1)),
    )
    for model, inputs in (
        (bert("MultipleChoice"), {"input_ids": ids, "labels": choices}),
        (bert("NextSentencePrediction"), {"input_ids": ids[:, 0], "labels": choices % 2}),
    ):
        with pytest.raises(UnsupportedError, match="no known kind is a causal language model's where logits are"):
            per_sample_losses(model, model(**inputs), inputs)


@pytest.mark.parametrize("what", [dict(penalties={"reg1": 1e-14}), dict(statistics=1)], ids=["penalties", "statistics"])
def test_micro_batches_without_labels_stop_nothing(tmp_path, what):
    samples = [{**s, "labels": torch.full_like(s["labels"], -100)} if k % 4 < 2 else s for k, s in enumerate(texts(8))]

    class InOrder:
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(samples)

    plain, ours = llama(), llama()
    args = options(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    type("Theirs", (InOrder, transformers.Trainer), {})(plain, args, train_dataset=samples).train()
    type("Ours", (InOrder, Trainer), {})(ours, args, train_dataset=samples, **what).train()
    assert_same_parameters(ours, plain, 1e-6)
    inputs = collated(samples[:2])
    assert per_sample_losses(ours, ours(**inputs), inputs).tolist() == [0, 0]


def test_of_what_a_loss_may_be_divided_by_the_nearest_is_taken():
    mean = torch.tensor(4.0)
    labels = {"labels": torch.zeros(1, 4001, dtype=torch.long)}  # 4000 are next ones
    half = (mean * 0.985).bfloat16()
    part, divides = _ratio(gpt2(), half, mean, labels, torch.tensor(4061))
    assert part == pytest.approx(4000 / 4061) and divides
    own = mean * 4000 / 8000.04
    part, divides = _ratio(gpt2(), own, mean, labels, torch.tensor(8000.04))
    assert part == pytest.approx(4000 / 8000.04, abs=1e-7) and divides
    assert _ratio(gpt2(), mean, mean, labels, torch.tensor(8000.04)) == (1.0, False)
    nothing = torch.tensor(float("nan"))
    assert _ratio(gpt2(), nothing, nothing, labels, torch.tensor(4000)) == (1.0, False)  # of which others tell
    with pytest.raises(UnsupportedError, match="there is more in it"):
        _ratio(gpt2(), mean * (1 + 5e-4), mean, labels, None)


def test_a_loss_that_is_nan_is_not_called_another_kind_of_loss(tmp_path):
    """Nor the mean over a micro-batch, of which there would be a warning."""
    for what in (dict(penalties={"reg1": 0.1}), dict(statistics=1)):
        model = llama()
        model.lm_head.weight.data.fill_(math.nan)
        args = options(tmp_path, gradient_accumulation_steps=2, max_steps=1)
        with pytest.raises(ArgumentError, match="losses are NaN or infinite at"):
            Ours(model, args, train_dataset=texts(8), **what).train()


def test_what_is_not_followed_is_refused(tmp_path):
    def trainer(args=None, **others):
        return Trainer(gpt2(), args or options(tmp_path), train_dataset=texts(4), **({"statistics": 1} | others))

    with pytest.raises(UnsupportedError, match="label smoothing"):
        trainer(options(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(UnsupportedError, match="compute_loss_func"):
        trainer(compute_loss_func=lambda *args, **kwargs: None)
    with pytest.raises(ArgumentTypeError, match="a function of outputs and inputs"):
        trainer(losses=3)
    with pytest.raises(ArgumentError, match="GradientRegularizer has no option regl: take of reg1, "):
        trainer(penalties={"regl": 0.1})
    with pytest.raises(ArgumentError, match="Monitor has no option layer: "):
        trainer(statistics={"layer": "all"})
    with pytest.warns(BootgradWarning, match="layers will do nothing"):
        trainer(penalties={"reg1": 0.1}, statistics={"layers": "all"})


def test_without_options_the_trainer_is_that_of_transformers_and_evaluation_always_is(tmp_path):
    plain, ours = gpt2(), gpt2()
    transformers.Trainer(plain, options(tmp_path), train_dataset=texts(8)).train()
    trainer = Trainer(ours, options(tmp_path), train_dataset=texts(8), eval_dataset=texts(4, seed=2))
    trainer.train()
    assert_same_parameters(ours, plain, 0)
    assert trainer.regularizer is trainer.monitor is trainer.report is None
    penalized = Trainer(ours, options(tmp_path), eval_dataset=texts(4, seed=2), penalties={"reg1": 1.0})
    assert penalized.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_mixin_goes_with_other_trainers(tmp_path):
    class Other(transformers.Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            type(self).steps += 1
            return super().training_step(*args, **kwargs)

    class Both(PerSample, Other):
        pass

    trainer = Both(gpt2(), options(tmp_path), train_dataset=texts(8), penalties={"reg1": 0.1})
    trainer.train()
    assert Both.steps == trainer.regularizer.step == 2


def test_adapters_alone_are_trained_and_counted(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True)
        )
    model.double()
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zeros at first, by which A has no gradient
            p.data.normal_(generator=generator, std=0.3)
    start = copy.deepcopy(model)
    trainer = Ours(model, options(tmp_path), train_dataset=texts(12), penalties={"reg1": 0.2}, statistics=1)
    trainer.train()
    want, found = reference(start, trainer.seen, next_token_losses, 0.2)
    assert_same_parameters(model, want, 1e-8)
    assert float(trainer.report.covariance_trace) == pytest.approx(found[-1][1])
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    assert changed == [n for n, p in model.named_parameters() if "lora_" in n]
    assert len(changed) == 4
