"""Whether "auto" chooses well where it can be measured: ways to run a job on the emulated cluster, predicted and timed.

python -m benchmarks.ranking --out benchmarks/results/ranking

Each cell is a shape of the cluster, a rate of its links and a pretended memory of a rank, so that the memory forces a
trade-off as it does for large models. Eight ranks train a small model with 16 samples each per optimizer step, in
micro-batches of 1, 4 or 16. The planner's model is calibrated in the same launch, chooses for each cell among all ways
that it knows, and is held against the times of its choice, of flat full sharding, and of others. It needs root and
iproute2.

What this verifies is the choice on a calibrated model, not the times of GPUs: gloo's collectives are the work of the
cores that compute, so nothing overlaps here.
"""
