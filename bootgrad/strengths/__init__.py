"""Strengths λ of the penalties that are set during training, from training data alone: rules, to be given in place of a number.

    reg = bootgrad.GradientRegularizer(model, reg1=bootgrad.strengths.Share(0.1), reg2="auto", center="ema")

A rule is asked for λ before each step, and shown the step after it. What rules measure is the gradient that a penalty adds,

    ∇R = (∇(L + λ R) − ḡ)/λ

from the two gradients that a step has anyway: no pass is made for it. It is that of the whole batch, of all micro-batches and
ranks, before a scaler's factor; by random signs and on fractions it is the estimate that the step takes. λ = 0 cannot be
measured, and these rules keep λ > 0.

**The first λ is that of the step it is measured on**, whatever the unit of the loss: the pass takes some λ', a trial, and what
is written to ``.grad`` is

    ḡ + (λ/λ') (∇(L + λ' R) − ḡ)

So it is, too, where λ ∇R was lost in the rounding of ḡ, that is shorter than 8e-6 ‖ḡ‖ in float32 and 0.06 ‖ḡ‖ in bfloat16: the
next step is a trial with a larger λ', and what was lost is left out of averages.

**Two penalties take turns to be measured**: one is taken alone, with 2λ, and on the next step with penalties the other is, with
2λ, too, so that both steps together have what they would have had.

Letters: ``ḡ`` the gradient of a batch's mean loss, ``R`` a penalty without λ, ``B`` samples, ``η`` the learning rate.
"""

from collections.abc import Callable

from ..seen import Seen
from .bound import Bound
from .measuring import LookAhead, Share
from .rule import Rule

__all__ = ["AUTO", "Bound", "LookAhead", "Rule", "Seen", "Share"]

AUTO: Callable[[], Rule] = Share  # what "auto" stands for
