"""MiCS for PyTorch Lightning: sharded training whose constant traffic stays inside small groups of ranks.

Importing this package registers ``Trainer(strategy="mics")`` and ``Fabric(strategy="mics")``, and lets
``LightningModule.load_from_checkpoint`` read sharded checkpoints. It imports neither torch nor Lightning: each public
name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_mics.integrations._registration import register

if TYPE_CHECKING:
    from lightning_mics.certification.certify import certify
    from lightning_mics.certification.report import CertifyReport
    from lightning_mics.collectives.control_plane import RanksDifferError
    from lightning_mics.integrations.accelerate import MiCSPlugin as MiCSPlugin
    from lightning_mics.integrations.fabric import MiCSFabricStrategy
    from lightning_mics.integrations.trainer.loss_scale_monitor import LossScaleMonitor
    from lightning_mics.integrations.trainer.strategy import MiCSStrategy
    from lightning_mics.integrations.trainer.traffic_monitor import TrafficMonitor
    from lightning_mics.sampler import ResumableSampler
    from lightning_mics.sharding.full_state_dict import full_state_dict
    from lightning_mics.sharding.options import CommunicationOptions
    from lightning_mics.sharding.pretrained import load_pretrained
    from lightning_mics.sharding.schedule import AccumulationSchedule
    from lightning_mics.sharding.shard_model import shard_model
    from lightning_mics.sharding.sharded import sharded
    from lightning_mics.techniques.partition_groups import PartitionGroups, create_partition_groups
    from lightning_mics.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "AccumulationSchedule",
    "CertifyReport",
    "CommunicationOptions",
    "LossScaleMonitor",
    "MiCSFabricStrategy",
    "MiCSStrategy",
    "PartitionGroups",
    "RanksDifferError",
    "ResumableSampler",
    "Topology",
    "TrafficMonitor",
    "certify",
    "create_partition_groups",
    "full_state_dict",
    "load_pretrained",
    "shard_model",
    "sharded",
]

_MODULES = {
    "AccumulationSchedule": "sharding.schedule",
    "CertifyReport": "certification.report",
    "CommunicationOptions": "sharding.options",
    "LossScaleMonitor": "integrations.trainer.loss_scale_monitor",
    "MiCSFabricStrategy": "integrations.fabric",
    "MiCSPlugin": "integrations.accelerate",  # not in __all__: a star import must not need the extra `accelerate`
    "MiCSStrategy": "integrations.trainer.strategy",
    "PartitionGroups": "techniques.partition_groups",
    "RanksDifferError": "collectives.control_plane",
    "ResumableSampler": "sampler",
    "Topology": "topology",
    "TrafficMonitor": "integrations.trainer.traffic_monitor",
    "certify": "certification.certify",
    "create_partition_groups": "techniques.partition_groups",
    "full_state_dict": "sharding.full_state_dict",
    "load_pretrained": "sharding.pretrained",
    "shard_model": "sharding.shard_model",
    "sharded": "sharding.sharded",
}

_SUBPACKAGES = ("checkpoint", "planning")  # subpackages with public names of their own


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBPACKAGES})


if not TYPE_CHECKING:  # type checkers use the imports above, and report other names

    def __getattr__(name: str) -> Any:
        if name in _SUBPACKAGES:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        if not isinstance(public, type):  # `inspect.getsource` and type hints need a class's own module
            public.__module__ = __name__
        return public


register()
