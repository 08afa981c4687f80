"""The keeper: a process per node that holds bytes of in-memory checkpoints. It imports no torch."""
