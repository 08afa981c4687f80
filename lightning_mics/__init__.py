"""MiCS for PyTorch Lightning: sharded training whose constant traffic stays inside small groups of ranks.

Importing this package registers ``Trainer(strategy="mics")`` and ``Fabric(strategy="mics")``, and lets
``LightningModule.load_from_checkpoint`` read sharded checkpoints.
"""

from lightning_mics.integrations.fabric import MiCSFabricStrategy
from lightning_mics.integrations.trainer import module_loading  # noqa: F401 - `load_from_checkpoint` reads directories too
from lightning_mics.integrations.trainer.strategy import MiCSStrategy
from lightning_mics.integrations.trainer.traffic_monitor import TrafficMonitor
from lightning_mics.sampler import ResumableSampler
from lightning_mics.sharding.pretrained import load_pretrained, start_from
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import PartitionGroups, create_partition_groups
from lightning_mics.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "AccumulationSchedule",
    "MiCSFabricStrategy",
    "MiCSStrategy",
    "PartitionGroups",
    "ResumableSampler",
    "Topology",
    "TrafficMonitor",
    "create_partition_groups",
    "load_pretrained",
    "shard_model",
    "start_from",
]
