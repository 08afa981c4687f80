"""Optimizers whose step does not work on DTensors as it is: run on other tensors, or rejected by class.

Most optimizers are sums and products of equal elements, which DTensors run shard by shard. The others, by what they
need::

    needs                           class                                      runs on
    operations that DTensor lacks   Rprop                                      each rank's shards
    all rows of a parameter         Adafactor, of torch and of transformers    one unsharded parameter at a time
    dot products of all parameters  LBFGS                                      one vector of all parameters, sharded
    whole matrices                  Muon                                       the owner of each matrix
    host memory                     any, with offload="optimizer"              copies of each rank's shards on the host

An optimizer of your own whose update needs whole matrices gives its parts as ``matrix_update``: see
:mod:`~lightning_mics.sharding.optimizers.whole_matrices`. One that needs all rows of each parameter says so by
``needs_whole_parameters = True``, on the class or on the object. Its update of a parameter then sees the unsharded
parameter and gradient; states of the parameter's shape are sharded between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer

from lightning_mics.sharding.optimizers.lbfgs import StepOnOneVector
from lightning_mics.sharding.optimizers.matrix_owners import MatrixOwners
from lightning_mics.sharding.optimizers.offload import Offload, reject_optimizer
from lightning_mics.sharding.optimizers.on_host import StepOnHost
from lightning_mics.sharding.optimizers.substitutes import StepOnShards, StepOnWholeParameters
from lightning_mics.sharding.optimizers.whole_matrices import StepOnOwners, needs_matrices

SUBSTITUTIONS: dict[str, Callable[[Optimizer], object]] = {
    "torch.optim.rprop.Rprop": StepOnShards,
    "torch.optim.Adafactor": StepOnWholeParameters,
    "torch.optim._adafactor.Adafactor": StepOnWholeParameters,
    "transformers.optimization.Adafactor": StepOnWholeParameters,
    "torch.optim.lbfgs.LBFGS": StepOnOneVector,
}


REJECTED: dict[str, str] = {
    "torch.optim.sparse_adam.SparseAdam": "takes sparse gradients, and those of sharded parameters are dense: use "
    "torch.optim.Adam or AdamW, and nn.Embedding(sparse=False)",
    "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer": "shards the states of an optimizer, "
    "which are sharded already, as parameters and gradients are: use the optimizer_class that it wraps",
}


SHARD_BY_SHARD = {
    "torch.optim.adadelta.Adadelta",
    "torch.optim.adagrad.Adagrad",
    "torch.optim.adam.Adam",
    "torch.optim.adamax.Adamax",
    "torch.optim.adamw.AdamW",
    "torch.optim.asgd.ASGD",
    "torch.optim.nadam.NAdam",
    "torch.optim.radam.RAdam",
    "torch.optim.rmsprop.RMSprop",
    "torch.optim.rprop.Rprop",
    "torch.optim.sgd.SGD",
}


NEEDS_MORE: dict[Callable[[Optimizer], object], str] = {
    StepOnWholeParameters: "whole parameters",
    StepOnOneVector: "one vector of all parameters, on the device",
}


def adapt_optimizer(optimizer: Optimizer, owners: MatrixOwners | None = None, *, offload: Offload = False) -> None:
    """Let an optimizer step on the parameters of a sharded model; most need nothing.

    Args:
        optimizer: Optimizer that holds parameters of a sharded model, or will before its first step.
        owners: Owners of the model's matrices; None where matrices get none.
        offload: What is in host memory; see :mod:`~lightning_mics.sharding.optimizers.offload`.

    Raises:
        TypeError: If its class cannot work on sharded parameters, or on those in host memory.
        ValueError: If one of its options does not work with ``offload``.
    """
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__]
    for name in names:
        if name in REJECTED:
            raise TypeError(f"{name.rpartition('.')[2]} {REJECTED[name]}")
    found = next((SUBSTITUTIONS[name] for name in names if name in SUBSTITUTIONS), None)
    if getattr(optimizer, "needs_whole_parameters", False):
        found = StepOnWholeParameters
    whole_matrices = needs_matrices(optimizer)
    if found is None and owners is not None and whole_matrices:
        found = partial(StepOnOwners, owners=owners)
    if offload:
        why = "whole matrices" if whole_matrices else NEEDS_MORE.get(found) if found else None
        reject_optimizer(type(optimizer).__name__, optimizer.param_groups, offload, why=why)
    if offload == "optimizer":
        found = partial(StepOnHost, element_by_element=names[0] in SHARD_BY_SHARD)
    if found is not None and not hasattr(optimizer, "_mics_substitution"):
        vars(optimizer)["_mics_substitution"] = found(optimizer)


def how_it_steps(optimizer: Optimizer) -> str | None:
    """A line for the user on how an adapted optimizer steps; None if there is nothing to say."""
    substitution = vars(optimizer).get("_mics_substitution")
    return substitution.report if isinstance(substitution, StepOnOwners) else None


def may_send(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer may communicate by operations on DTensors: all but those known not to."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" not in SHARD_BY_SHARD
