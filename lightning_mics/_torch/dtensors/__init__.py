"""Private names of DTensor: what users do to sharded tensors."""
