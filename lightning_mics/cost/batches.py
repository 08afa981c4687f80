"""The division of the global batch: global batch = micro-batch x ranks x accumulation, in sequences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """The batches of a rank.

    Attributes:
        micro: Sequences per rank and micro-step.
        accumulation: Micro-steps per optimizer step.
    """

    micro: int
    accumulation: int


def split_global_batch(
    global_batch_size: int,
    *,
    ranks: int,
    micro: int | None = None,
    accumulation: int | None = None,
    largest_micro: int = 1,
) -> Batches:
    """Find the largest micro-batch, and so the fewest micro-steps, that make up ``global_batch_size`` exactly.

    Args:
        global_batch_size: Sequences per optimizer step, over all ranks.
        ranks: Ranks in the job.
        micro: Sequences per rank and micro-step; None to choose.
        accumulation: Micro-steps per optimizer step; None to choose.
        largest_micro: Most sequences per rank and micro-step that memory allows, if ``micro`` is None.

    Raises:
        ValueError: If a number is not positive, or no batches make up ``global_batch_size``; the message names the
            nearest sizes that work.
    """
    given = {
        "global_batch_size": global_batch_size,
        "data.batch_size": micro,
        "trainer.accumulate_grad_batches": accumulation,
    }
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value} must be a whole number of at least 1")
    unit = ranks * (micro or 1) * (accumulation or 1)
    fits = global_batch_size == unit if micro and accumulation else global_batch_size % unit == 0
    if not fits:
        raise ValueError(_why_unsplittable(global_batch_size, ranks=ranks, micro=micro, accumulation=accumulation))
    of_rank = global_batch_size // ranks
    if micro is None:
        micro = of_rank // accumulation if accumulation else _largest(of_rank, largest_micro)
    return Batches(micro, of_rank // micro)


def _largest(of_rank: int, largest_micro: int) -> int:
    return next((micro for micro in range(min(largest_micro, of_rank), 0, -1) if of_rank % micro == 0), 1)


def _why_unsplittable(global_batch_size: int, *, ranks: int, micro: int | None, accumulation: int | None) -> str:
    factors = [f"{ranks} ranks"]
    if micro:
        factors.append(f"data.batch_size={micro}")
    if accumulation:
        factors.append(f"trainer.accumulate_grad_batches={accumulation}")
    unit = ranks * (micro or 1) * (accumulation or 1)
    if micro and accumulation:
        return (
            f"global_batch_size={global_batch_size} sequences are not {' x '.join(factors)} = {unit}; set "
            f"global_batch_size={unit}, or leave one of the two at auto"
        )
    below = global_batch_size // unit * unit
    nearest = f"{below} and {below + unit}" if below else f"{unit} and {2 * unit}"
    return (
        f"global_batch_size={global_batch_size} sequences cannot be split over {' x '.join(factors)}; the nearest "
        f"that can are {nearest}"
    )
