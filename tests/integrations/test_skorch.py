import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bootgrad.errors import ArgumentError

from .plain import assert_same_parameters, batches, classifier, trained

skorch = pytest.importorskip("skorch")
from bootgrad.integrations.skorch import PerSample  # noqa: E402


class Classifier(PerSample, skorch.NeuralNetClassifier):
    pass


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = classifier()

    def forward(self, x):
        return self.model(x)


def net(**options):
    settings = dict(criterion=nn.CrossEntropyLoss, criterion__reduction="none", lr=0.1, batch_size=8, max_epochs=2)
    return Classifier(Network, **(settings | dict(train_split=None, verbose=0) | options))


def data(number=20):
    x, y = batches([number])[0]
    return x.numpy(), y.numpy(), [(x[k : k + 8], y[k : k + 8]) for k in range(0, number, 8)]


def test_a_net_takes_the_steps_of_a_plain_loop_and_its_history_has_the_numbers():
    x, y, parts = data()
    fitted = net(penalties={"reg1": 0.3}).fit(x, y)
    want, traces = trained(classifier(), [[p] for p in parts] * 2, reg1=0.3)
    assert_same_parameters(fitted.module_.model, want)
    seen = np.array(fitted.history[:, "batches", :, "bootgrad/covariance_trace"]).ravel()
    assert seen.tolist() == pytest.approx(traces)
    assert fitted.regularizer_.step == 6


def test_without_penalties_it_is_the_mean_loss():
    x, y, parts = data()
    fitted = net().fit(x, y)
    plain = skorch.NeuralNetClassifier(
        Network, criterion=nn.CrossEntropyLoss, lr=0.1, batch_size=8, max_epochs=2, train_split=None, verbose=0
    ).fit(x, y)
    assert_same_parameters(fitted.module_.model, plain.module_.model, 1e-12)
    assert fitted.history[:, "train_loss"] == pytest.approx(plain.history[:, "train_loss"])


def test_predictions_are_those_of_the_batch_whatever_the_passes():
    x, y, _ = data()
    for options in ({"fraction": 0.5}, {"method": "finite_difference"}, {"method": "random_signs"}):
        scores = skorch.callbacks.EpochScoring("accuracy", on_train=True, name="train_accuracy")
        fitted = net(penalties={"reg1": 0.1, **options}, callbacks=[scores]).fit(x, y)
        assert 0 <= fitted.history[-1, "train_accuracy"] <= 1
        step = fitted.train_step_single((torch.from_numpy(x), torch.from_numpy(y)))
        assert step["y_pred"].shape == (20, 3)


def test_nets_are_validated_cloned_searched_and_pickled():
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    x, y, _ = data(40)
    fitted = net(penalties={"reg1": 0.1, "center": "ema"}, train_split=skorch.dataset.ValidSplit(4)).fit(x, y)
    assert np.isfinite(fitted.history[-1, "valid_loss"])
    assert clone(fitted).penalties == fitted.penalties
    again = pickle.loads(pickle.dumps(fitted))
    fitted.partial_fit(x, y)
    again.partial_fit(x, y)
    assert again.regularizer_.model is again.module_
    assert again.regularizer_.step == fitted.regularizer_.step > 4
    assert_same_parameters(again.module_, fitted.module_, 0)
    grid = {"penalties": [{"reg1": 0.01}, {"reg1": 0.1}], "max_epochs": [1]}
    search = GridSearchCV(net(), grid, cv=2, scoring="accuracy", error_score="raise").fit(x, y)
    assert search.best_params_["penalties"] in grid["penalties"]


def test_a_new_module_has_a_new_regularizer_and_a_reduced_loss_is_refused():
    x, y, parts = data()
    fitted = net(penalties={"reg1": 0.3}).fit(x, y)
    first = fitted.regularizer_
    fitted.fit(x, y)
    assert fitted.regularizer_ is not first
    assert_same_parameters(fitted.module_.model, trained(classifier(), [[p] for p in parts] * 2, reg1=0.3)[0])
    with pytest.raises(ArgumentError, match='criterion__reduction="none"'):
        net(penalties={"reg1": 0.3}, criterion__reduction="mean").fit(x, y)
