"""Parameters that no loss uses keep ``grad=None`` in accumulation windows too, so that no optimizer changes them.

Before the boundary a parameter without a gradient is reduced as zeros: see [Note: Zero gradients before the boundary].
One that nothing has used in the whole window then has a gradient of zeros, where one process has none, and weight decay
and moments would change it. Whether no rank has used it is known by no rank alone. In the first window with zeros all
ranks compare which parameters they have used, on the control plane. In most models each was used by some rank, and
nothing is compared any more. Otherwise the unused ones are compared in each window, until there are none left::

    window                          1          2          3          4
    used by any rank                a b - -    a b - -    a b c -    a b - -
    compared                        a b c d        c d        c d          d
    gradient is None again of           c d        c d          d          d
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import fsdp_modules, sharded_parameters
from lightning_mics._torch.units.param_groups import NotedUse
from lightning_mics.collectives.control_plane import ControlPlane


class NeverUsed:
    """Removes the zero gradients of parameters that no rank has used, for one model; the module says which.

    Args:
        root: The sharded model.
        control: Control plane of all ranks.
    """

    def __init__(self, root: FSDPModule, control: ControlPlane) -> None:
        self._modules = fsdp_modules(root).values()
        self._control = control
        self._uses = [NotedUse(module) for module in self._modules]
        self._never = [True for uses in self._uses for _ in uses.used]  # by any rank, in a window with zeros
        self._without: set[nn.Parameter] = set()  # parameters without a gradient when the window began

    def begin(self) -> None:
        """Begin a window with zeros: gradients that exist by then are kept."""
        if any(self._never):
            self._without = {parameter for parameter in self._parameters() if parameter.grad is None}
            for uses in self._uses:
                uses.begin()

    def remove_zeros(self, used_directly: Set[nn.Parameter]) -> None:
        """Remove zero gradients after a backward in which gradients of the window were reduced; every rank calls it.

        Args:
            used_directly: Parameters with a gradient of another kind, which is not reduced with the others: each [any].
        """
        if not any(self._never):
            return
        parameters = list(self._parameters())
        noted = (bit for uses in self._uses for bit in uses.used)
        used = [bit or parameter in used_directly for bit, parameter in zip(noted, parameters, strict=True)]
        by_any = self._control.any_of(used, "compares which parameters it has used")
        self._never = [never and not bit for never, bit in zip(self._never, by_any, strict=True)]
        for never, parameter in zip(self._never, parameters, strict=True):
            if never and parameter in self._without:
                parameter.grad = None

    def end(self) -> None:
        """End a window, or abandon it."""
        self._without = set()
        for uses in self._uses:
            uses.end()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for module in self._modules for parameter in sharded_parameters(module))
