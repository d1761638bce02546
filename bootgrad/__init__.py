"""Per-sample gradient norms, covariance traces and the regularizers built on them, cheap enough to train with."""

from . import centers, ops, planning, strengths, theory
from .errors import BootgradError, BootgradWarning
from .micro_batches import accumulate
from .noise_scale import NoiseScale
from .normalization import replace_batchnorm
from .per_sample import PerSampleGradients
from .plans import plan
from .recurrent import replace_rnn
from .regularizers import GradientRegularizer, Report, reg1, reg2
from .statistics import Statistics, record
from .verification import verify

__version__ = "0.1.0"
__all__ = [
    "BootgradError",
    "BootgradWarning",
    "GradientRegularizer",
    "NoiseScale",
    "PerSampleGradients",
    "Report",
    "Statistics",
    "accumulate",
    "centers",
    "ops",
    "plan",
    "planning",
    "record",
    "reg1",
    "reg2",
    "replace_batchnorm",
    "replace_rnn",
    "strengths",
    "theory",
    "verify",
]
