"""Which candidate is taken: the fastest that fits, and of those as fast as it the simplest."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mics.policy.candidates import Candidate

LEAST_TOKENS = 2048  # tokens of a micro-step below which kernels lose their share of the peak, which is not modeled


def fastest(
    candidates: Sequence[Candidate], baseline: Candidate, tuned: Candidate, *, sample_tokens: int | None = None
) -> Candidate:
    """The candidate to take: the fastest that fits, and of those as fast as it the simplest.

    What is predicted within 1 % counts as equally fast: then inputs, caches and sums on the host are avoided, then
    caches on ranks, then gathers ahead, then saved activations of blocks, then bytes between nodes, then memory, then
    large partition groups.
    Candidates that are slower than the baseline by more than 1 % if all or no communication overlaps are not taken,
    because the share that overlaps is uncertain.

    Args:
        candidates: Candidates of a job, at least one.
        baseline: Full sharding over all ranks by FSDP2 with its defaults.
        tuned: Fastest of FSDP2's own options over all ranks, some of which are not ours; what is equally fast is no
            slower than it, and where none is as fast, the fastest is taken.
        sample_tokens: Tokens of one sample; None does not avoid small micro-batches.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return min(candidates, key=lambda candidate: (candidate.memory_bytes, candidate.seconds.expected))
    fitting = with_enough_tokens(fitting, sample_tokens)
    if baseline.fits:
        fitting = [candidate for candidate in fitting if not _is_risky(candidate, baseline)] or fitting
    best = min(candidate.seconds.expected for candidate in fitting)
    others = [other.seconds.expected for other in (baseline, tuned) if other.fits]
    bound = min([1.01 * best, *(max(best, seconds) for seconds in others)])
    return min((c for c in fitting if c.seconds.expected <= bound), key=_simplicity)


def with_enough_tokens(candidates: list[Candidate], sample_tokens: int | None) -> list[Candidate]:
    """The candidates whose micro-steps have enough tokens, or all tokens there are; all candidates if none has.

    Args:
        candidates: Candidates of a job.
        sample_tokens: Tokens of one sample; None leaves all candidates.
    """
    if sample_tokens is None:
        return candidates
    enough = [c for c in candidates if c.batches.micro * sample_tokens >= LEAST_TOKENS or c.batches.accumulation == 1]
    return enough if any(candidate.fits for candidate in enough) else candidates


def _is_risky(candidate: Candidate, baseline: Candidate) -> bool:
    ours, theirs = candidate.seconds, baseline.seconds
    return ours.least > 1.01 * theirs.least or ours.most > 1.01 * theirs.most


def _simplicity(candidate: Candidate) -> tuple[float, ...]:
    options = candidate.communication
    on_ranks = (options.cache_parameters == "rank") + (options.accumulate_gradients == "rank")
    on_ranks += bool(options.frozen_on_ranks)
    return (
        candidate.activation_offload + bool(options.cache_offload),
        on_ranks,
        options.units_ahead,
        -(candidate.recomputed_share or 0.0),
        round(candidate.node_sent.between_bytes, -6),
        candidate.memory_bytes,
        candidate.topology.partition_size,
        candidate.seconds.expected,
    )
