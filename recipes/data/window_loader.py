"""A loader that goes on where it was, and says so if it cannot."""

from __future__ import annotations

from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader


class WindowLoader(StatefulDataLoader):
    """torchdata's loader; a position that was saved with another number of workers ends in a bare assertion there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the position is of a loader with another number of workers."""
        # as torchdata 0.11 writes it; without workers there is no snapshot
        saved = state_dict.get("_snapshot", {}).get("_main_snapshot", {}).get("_num_workers", 0)
        if state_dict and saved != self.num_workers:
            raise ValueError(
                f"data.num_workers={self.num_workers}, but the run to resume had {saved}, and its position in the data "
                f"can be loaded with that only; use data.num_workers={saved}"
            )
        super().load_state_dict(state_dict)
