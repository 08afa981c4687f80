"""In-memory checkpoints: the last optimizer step in the memory of two nodes, from which a job resumes after a death."""
