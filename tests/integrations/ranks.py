"""Run by torchrun on two processes: a framework's training, compared with a plain loop on the batch of both.

torchrun --nproc-per-node 2 ranks.py FRAMEWORK
"""

import copy
import os
import sys
import tempfile
import warnings

import torch

from tests.integrations.plain import assert_same_parameters, batches, classifier, losses_of, trained

RANK = int(os.environ["RANK"])
SIZES = ((5, 3), (2, 6), (4, 4), (1, 5))  # of the ranks, by micro-batch
OPTIONS = {"penalties": {"reg1": 0.3}, "statistics": {"every": 2}}


def parts():
    """By rank, the micro-batches."""
    everything = [batches(sizes, seed=k) for k, sizes in enumerate(SIZES)]
    return list(zip(*everything, strict=True))


def expected(kind, n):
    """With penalties every sample counts once; without, ranks are averaged, and so are batches."""
    if kind == "penalties":
        of_ranks = parts()
        windows = [[of_ranks[r][k] for k in range(i, i + n) for r in (0, 1)] for i in range(0, len(SIZES), n)]
        return trained(classifier(), windows, reg1=0.3)[0]
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(0, len(SIZES), n):
        optimizer.zero_grad()
        for k in range(i, i + n):
            for r in (0, 1):
                (losses_of(model, *parts()[r][k]).mean() / (2 * n)).backward()
        optimizer.step()
    return model


def lightning(kind, n):
    from tests.integrations.test_lightning import Network, Penalties, Statistics, fit, loader

    module = Network()
    ours = Penalties(**OPTIONS[kind]) if kind == "penalties" else Statistics(**OPTIONS[kind])
    options = dict(devices=2, strategy="ddp", use_distributed_sampler=False, accumulate_grad_batches=n)
    fit(module, loader(parts()[RANK]), [ours], **options)
    assert_same_parameters(module.model, expected(kind, n))
    assert ours._loop.regularizer is None or ours.report.batch_size == sum(map(sum, SIZES[-n:]))


def accelerate(kind, n):
    from accelerate import Accelerator
    from accelerate.state import GradientState

    from tests.integrations.test_accelerate import PerSample, run

    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n)
    model = classifier()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ours = PerSample(accelerator, model, **{kind: OPTIONS[kind]})
    run(accelerator, model, optimizer, parts()[RANK], ours)
    assert_same_parameters(accelerator.unwrap_model(model), expected(kind, n))


def transformers(kind, n):
    """Against the plain Trainer for statistics, and a plain loop on the batches of both ranks for penalties."""
    from tests.integrations.test_transformers import Ours, Theirs, llama, next_token_losses, options, reference, texts

    def run(make, **others):
        with tempfile.TemporaryDirectory() as folder:
            model = llama()
            start = copy.deepcopy(model)
            args = options(folder, gradient_accumulation_steps=n, per_device_train_batch_size=2, max_grad_norm=0.3)
            trainer = make(model, args, train_dataset=texts(16), **others)
            trainer.train()
            return trainer, model, start

    trainer, model, start = run(Ours, **{kind: OPTIONS[kind]})
    if kind == "statistics":
        _, plain, _ = run(Theirs)
        assert_same_parameters(model, plain, 1e-7)
        return
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, [[dict(b) for b in step] for step in trainer.seen])
    steps = [[*a, *b] for a, b in zip(*everywhere, strict=True)]
    want, found = reference(start, steps, lambda m, i: next_token_losses(m, i, first=1), 0.3, clip=0.3)
    assert_same_parameters(model, want, 1e-7)
    logs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(abs(a - b) < 1e-3 for a, (b, _) in zip(logs, found, strict=True)), (logs, found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    train = {"lightning": lightning, "accelerate": accelerate, "transformers": transformers}[sys.argv[1]]
    for kind in OPTIONS:
        for n in (1, 2):
            train(kind, n)
            print(kind, n)
    print(f"rank {RANK} is done")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
