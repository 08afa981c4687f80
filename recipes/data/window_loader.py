"""A loader that resumes at its saved position, or raises an error that explains why it cannot."""

from __future__ import annotations

from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader


class WindowLoader(StatefulDataLoader):
    """The loader of torchdata, with an error for positions that were saved with another number of workers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved position.

        Raises:
            ValueError: If it was saved with another number of workers.
        """
        # as torchdata 0.11 writes it; without workers there is no snapshot
        saved = state_dict.get("_snapshot", {}).get("_main_snapshot", {}).get("_num_workers", 0)
        if state_dict and saved != self.num_workers:
            raise ValueError(
                f"data.num_workers={self.num_workers}, but the run to resume had {saved}, and its position in the data "
                f"can be loaded with that only; use data.num_workers={saved}"
            )
        super().load_state_dict(state_dict)
