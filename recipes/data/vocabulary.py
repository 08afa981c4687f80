"""How many tokens the data have, for what is configured before data are there."""

from __future__ import annotations


def vocabulary_of(tokenizer: str | None, trained: int) -> int:
    """The tokens of a tokenizer that has a name or a folder; ``trained`` if one is to be trained."""
    if tokenizer is None:
        return trained
    from recipes.data.tokenizer import load_tokenizer  # transformers is slow to import, and most runs train one

    return len(load_tokenizer(tokenizer))
