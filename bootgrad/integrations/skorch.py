"""Penalties in skorch's nets, by a mixin.

class Classifier(bootgrad.integrations.skorch.PerSample, skorch.NeuralNetClassifier):
pass

Classifier(Network, criterion=nn.CrossEntropyLoss, criterion__reduction="none", penalties={"reg1": 0.01})
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import GradientRegularizer
from ..errors import ArgumentError
from .loops import loop_of, numbers_of
from .required import missing

try:
    from skorch.dataset import unpack_data
except ModuleNotFoundError as error:
    raise missing("skorch", error) from None


class PerSample:
    """A mixin for `skorch.NeuralNet` and what is derived of it, whose criterion has ``reduction="none"``.

    A sample's loss is the mean of what the criterion gives for it. Steps are those of a `bootgrad.GradientRegularizer`,
    ``regularizer_``, and the history has what it saw of each batch. Nets are cloned, searched over and pickled as ever.

    Args:
        *args: of the net.
        **kwargs: of the net.
        penalties: options of `bootgrad.GradientRegularizer`; None for the plain mean loss.
    """

    def __init__(self, *args: Any, penalties: Mapping[str, Any] | None = None, **kwargs: Any):
        """Keep the options; the module is there when the net is initialized."""
        self.penalties = penalties
        super().__init__(*args, **kwargs)

    def initialize(self) -> Any:
        """As of the net; with a new module comes a new regularizer."""
        self.regularizer_: GradientRegularizer | None = None
        self.regularizer_state_: dict[str, Any] | None = None
        return super().initialize()  # type: ignore[misc]  # of the net

    def __getstate__(self) -> dict[str, Any]:
        """As of the net; of the regularizer, whose module is written elsewhere, what it goes on from."""
        state = dict(super().__getstate__())  # type: ignore[misc]
        if state.get("regularizer_") is not None:
            state |= {"regularizer_": None, "regularizer_state_": state["regularizer_"].state_dict()}
        return state

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """As of the net, with the backward pass of the regularizer."""
        net: Any = self
        theirs: Any = super()
        if self.penalties is None:
            step: dict[str, Any] = theirs.train_step_single(batch, **fit_params)
            return step
        net._set_training(True)
        x, y = unpack_data(batch)
        outputs: list[Any] = []

        def losses(x: Any, y: Any) -> Tensor:
            outputs.append(net.infer(x, **fit_params))
            return _by_sample(theirs.get_loss(outputs[-1], y, X=x, training=True))

        regularizer = self._regularizer_of(net.module_)
        report = regularizer.backward(losses, x, y)
        if regularizer.fraction < 1:  # in which no pass is over the whole batch
            with torch.no_grad():
                outputs = [net.infer(x, **fit_params)]
        for name, value in numbers_of(report).items():
            net.history.record_batch(name, float(value))
        return {"loss": report.loss, "y_pred": outputs[0]}

    def get_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of the net, and the mean where it is by sample."""
        theirs: Any = super()
        mean: Tensor = theirs.get_loss(*args, **kwargs).mean()
        return mean

    def _regularizer_of(self, module: nn.Module) -> GradientRegularizer:
        regularizer = self.regularizer_
        if regularizer is None or regularizer.model is not module:
            regularizer = loop_of(module, self.penalties).regularizer
            assert regularizer is not None
            if self.regularizer_state_ is not None:
                regularizer.load_state_dict(self.regularizer_state_)
            self.regularizer_, self.regularizer_state_ = regularizer, None
        return regularizer


def _by_sample(losses: Tensor) -> Tensor:
    """(B,) of what a criterion gives for samples, (B,) or (B, …)."""
    if losses.dim() == 0:
        raise ArgumentError('the criterion gives one loss for the batch: pass criterion__reduction="none" to the net')
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
