"""The vocabulary size of the data, for configurations that are composed before data exist."""

from __future__ import annotations


def vocabulary_of(tokenizer: str | None, trained: int) -> int:
    """Number of tokens of a tokenizer.

    Args:
        tokenizer: Folder, or name on the hub; None if it is trained on the data.
        trained: Number of tokens of a trained tokenizer.
    """
    if tokenizer is None:
        return trained
    from recipes.data.tokenizer import load_tokenizer  # transformers is slow to import, and most runs train one

    return len(load_tokenizer(tokenizer))
