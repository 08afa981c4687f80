"""What "auto" gains over full sharding: every model of ``conf/model`` on every cluster of ``conf/cluster``, as planned.

python -m benchmarks.auto --out benchmarks/results/auto

Nothing runs: each pair is planned, at the network rate of the cluster and at slower ones. The page compares what is
recommended with FSDP2 over all ranks, with its defaults and with the best of its own options; again with another
formula of seconds, and again where inputs of blocks may wait on the host. Seconds are predictions, whose error on
published runs is in benchmarks/results/published; bytes are exact.
"""
