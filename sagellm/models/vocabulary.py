"""Whether two models speak of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sagellm.errors import UserError
from sagellm.models.config import ModelConfig, read_json

TOKENIZER = "tokenizer.json"


def check_same(config: ModelConfig, folder: Path, draft: ModelConfig, draft_folder: Path) -> None:
    """UserError unless a draft model has as many tokens as the model and, where both have a tokenizer, the same."""
    accepted = "accepted: a model of the same vocabulary"
    if draft.vocab_size != config.vocab_size:
        sizes = f"{draft.vocab_size} tokens and {config.name!r} {config.vocab_size}"
        raise UserError(f"draft model {draft.name!r} has {sizes}; {accepted}")
    ours, theirs = _tokens(folder), _tokens(draft_folder)
    if ours is None or theirs is None or ours == theirs:
        return
    token = min(set(ours.items()) ^ set(theirs.items()), key=lambda pair: pair[1])[1]
    raise UserError(
        f"draft model {draft.name!r} has another tokenizer: token {token} is not the same; {accepted}"
    )


def _tokens(folder: Path) -> dict[str, int] | None:
    """Text -> id, as the tokenizer's file has it; None where there is none."""
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    known: Any = read_json(file)
    vocabulary = known.get("model", {}).get("vocab", {})
    pairs = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((t, i) for i, (t, _) in enumerate(vocabulary))
    )
    return {**dict(pairs), **{added["content"]: added["id"] for added in known.get("added_tokens", [])}}
