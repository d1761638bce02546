import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bootgrad.errors import ArgumentError, UnsupportedError

from .plain import assert_same_parameters, batches, classifier, losses_of, trained

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


class Squared(skorch.NeuralNetClassifier):
    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs) ** 2


def test_a_loss_of_a_nets_own_is_taken_behind_the_mixin_and_refused_before_it():
    class Behind(PerSample, Squared):
        pass

    class Before(Classifier):
        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs) ** 2

    x, y, parts = data()
    settings = dict(criterion=nn.CrossEntropyLoss, criterion__reduction="none", lr=0.1, batch_size=8, max_epochs=1)
    settings |= dict(train_split=None, verbose=0, penalties={"reg1": 0.3})
    fitted = Behind(Network, **settings).fit(x, y)
    want, _ = trained(classifier(), [[p] for p in parts], reg1=0.3, losses=lambda *a: losses_of(*a) ** 2)
    assert_same_parameters(fitted.module_.model, want)
    with pytest.raises(UnsupportedError, match="the get_loss of Before comes before that of PerSample"):
        Before(Network, **settings).fit(x, y)


def test_penalties_that_are_set_anew_are_those_of_the_next_step():
    x, y, parts = data()
    steps = [[p] for p in parts]
    fitted = net(penalties={"reg1": 0.3}, max_epochs=1).fit(x, y)
    first, _ = trained(classifier(), steps, reg1=0.3)
    fitted.set_params(penalties={"reg1": 2.0}).partial_fit(x, y)
    second, _ = trained(first, steps, reg1=2.0)
    assert_same_parameters(fitted.module_.model, second)
    again = pickle.loads(pickle.dumps(fitted)).set_params(penalties={"reg1": 0.5})
    again.partial_fit(x, y)
    assert_same_parameters(again.module_.model, trained(second, steps, reg1=0.5)[0])
    assert again.regularizer_.step == len(steps)


def test_predictions_do_not_keep_a_graph():
    x, y, _ = data()
    fitted = net(penalties={"reg1": 0.1, "method": "finite_difference"}).fit(x, y)
    step = fitted.train_step_single((torch.from_numpy(x), torch.from_numpy(y)))
    assert step["y_pred"].grad_fn is None
