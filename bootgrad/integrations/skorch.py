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
from ..errors import ArgumentError, UnsupportedError
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
        penalties: options of `bootgrad.GradientRegularizer`; None for the plain mean loss. With other ones, by ``set_params``,
            the next step begins with a new regularizer.

    Raises, at the first step:
        UnsupportedError: a net with a ``get_loss`` that comes before the mixin's.
    """

    def __init__(self, *args: Any, penalties: Mapping[str, Any] | None = None, **kwargs: Any):
        """Keep the options; the module is there when the net is initialized."""
        self.penalties = penalties
        super().__init__(*args, **kwargs)

    def initialize(self) -> Any:
        """As of the net; with a new module comes a new regularizer."""
        self.regularizer_: GradientRegularizer | None = None
        self.regularizer_state_: dict[str, Any] | None = None
        self.regularizer_options_: dict[str, Any] | None = None  # that it was made of
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
            found = net.infer(x, **fit_params)
            outputs.append(_detached(found))
            return _by_sample(theirs.get_loss(found, y, X=x, training=True))

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
        regularizer, options = self.regularizer_, dict(self.penalties or {})
        is_as_made = self.regularizer_options_ == options
        if regularizer is None or regularizer.model is not module or not is_as_made:
            _check_loss(type(self))
            regularizer = loop_of(module, options).regularizer
            assert regularizer is not None
            if self.regularizer_state_ is not None and is_as_made:
                regularizer.load_state_dict(self.regularizer_state_)
            self.regularizer_, self.regularizer_state_, self.regularizer_options_ = regularizer, None, options
        return regularizer


def _check_loss(kind: type) -> None:
    if kind.get_loss is not PerSample.get_loss:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"the get_loss of {kind.__name__} comes before that of PerSample, and no loss by sample is asked of it: put it "
            "into a net of its own, behind the mixin, class Ours(PerSample, NetWithThatLoss), and let it give (B,)"
        )


def _detached(outputs: Any) -> Any:
    """What a module gives, without the graph that it came by."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return tuple(_detached(part) for part in outputs) if isinstance(outputs, tuple | list) else outputs


def _by_sample(losses: Tensor) -> Tensor:
    """(B,) of what a criterion gives for samples, (B,) or (B, …)."""
    if losses.dim() == 0:
        raise ArgumentError('the criterion gives one loss for the batch: pass criterion__reduction="none" to the net')
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
