"""Trains a little and writes what it saw to ``FOLDER/rank-N.json``; run by whatever launches the ranks.

python tests/support/launch_script.py FOLDER [DEVICES [NODES]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script, in a process of its own


def main(folder: str, devices: str = "2", nodes: str = "1") -> None:
    torch.manual_seed(1)
    module = TinyModule()
    trainer = make_trainer(folder, strategy="mics", devices=int(devices), num_nodes=int(nodes))
    trainer.fit(module, loader(8))
    topology = trainer.strategy.topology
    facts = {
        "world size": trainer.world_size,
        "nodes": topology.nodes,
        "partition groups": topology.replicas,
        "node": trainer.node_rank,
        "local rank": trainer.local_rank,
        "environment": type(trainer.strategy.cluster_environment).__name__,
        "started by Lightning": trainer.strategy.launcher is not None,
        "steps": trainer.global_step,
        "loss": float(trainer.callback_metrics["train_loss"]),
        "weight": float(module.net.norm.weight.full_tensor().sum()),
    }
    Path(folder, f"rank-{trainer.global_rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
