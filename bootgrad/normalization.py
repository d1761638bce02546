"""Batch norm couples samples, so that per-sample gradients do not exist; group norm is the usual replacement."""

from torch import nn

from .errors import ArgumentError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LEAST_CHANNELS = 4  # of a group: over one alone, what differs between channels is lost
_LEAST_FEATURES = 8  # of a group that is normalized over them alone


def replace_batchnorm(module: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every batch norm in a module by a group norm of as many channels.

    Affine parameters, their ``requires_grad``, dtype, device and the training flag are kept; running statistics are dropped, so
    a trained model's outputs change.

    Args:
        module: changed in place, except where it is a batch norm itself.
        groups: number of groups wanted; each layer takes the largest divisor of its channels that ``groups`` allows and that
            leaves 4 channels or more to a group, all where there are fewer; of a ``BatchNorm1d``, which may have no positions
            to average over, 8 or more.

    Returns:
        ``module``, or its replacement.

    Raises:
        ArgumentError: ``groups`` below 1, or a lazy batch norm whose channels are not known yet.
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ArgumentError(f"groups must be a whole number of at least 1; got {groups!r}")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _group_norm(module, groups)
    for name, child in module.named_children():
        module.add_module(name, replace_batchnorm(child, groups))
    return module


def _group_norm(norm: nn.modules.batchnorm._BatchNorm, groups: int) -> nn.GroupNorm:
    C = norm.num_features
    if C < 1 or not isinstance(norm, _BATCH_NORMS):
        raise ArgumentError(f"{type(norm).__name__} has no known number of channels: run a forward pass first")
    least = _LEAST_FEATURES if isinstance(norm, nn.BatchNorm1d) else _LEAST_CHANNELS
    divisor = next(g for g in range(min(groups, max(1, C // least)), 0, -1) if C % g == 0)
    out = nn.GroupNorm(divisor, C, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        out.weight, out.bias = norm.weight, norm.bias
    return out.train(norm.training)
