"""Where pretrained weights are on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

WANTED = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]


def pretrained_folder(name: str) -> Path:
    """``name`` if it is a folder, else the folder of that name on the hub, downloaded unless it is there already.

    Every rank may call it: the processes of a machine share its cache, and the first to come downloads.
    """
    return Path(name) if Path(name).exists() else Path(snapshot_download(name, allow_patterns=WANTED))
