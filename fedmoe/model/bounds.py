"""Checks the limits of the base model: token ids within its embedding, and rows within its positions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmoe.data.examples import padding_id
from fedmoe.data.flat import FlatExamples
from fedmoe.errors import BaseModelError, DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

REMEDY = (
    "use the tokenizer that was published with the base model, or a base model whose embeddings were resized to this "
    "tokenizer"
)


def n_embeddings(config: "PretrainedConfig") -> int:
    """Number of token ids that the base model knows, from 0 on."""
    return int(config.get_text_config().vocab_size)


def n_positions(config: "PretrainedConfig") -> int | None:
    """Maximum number of tokens of one row for the base model, None if its config names no bound.

    It includes the factor by which the rotary positions are stretched.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return max([limit, *(_stretched(rope, limit) for rope in _ropes(text))])


def _ropes(text: "PretrainedConfig") -> list[dict[str, Any]]:
    """The settings of the rotary positions; some models have one per kind of layer."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _stretched(rope: dict[str, Any], limit: int) -> int:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    return int((factor or 1.0) * (original or limit))


def check_max_length(max_length: int, config: "PretrainedConfig", base_model: str) -> None:
    """Raise SettingsError if rows may become longer than the model's context."""
    limit = n_positions(config)
    if limit is not None and max_length > limit:
        raise SettingsError(
            f"max_length {max_length} is beyond the {limit} positions of the base model {base_model}: "
            f"give --max-length {limit} or less",
            about="max_length",
        )


def check_padding(tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", base_model: str) -> None:
    """Raise BaseModelError if the model does not know the id with which batches are padded."""
    pad, n = padding_id(tokenizer), n_embeddings(config)
    if pad >= n:
        raise BaseModelError(
            f"the padding token {tokenizer.convert_ids_to_tokens(pad)!r} has the id {pad}, the base model {base_model} "
            f"knows the ids 0 to {n - 1}: {REMEDY}",
            about="pad_token",
        )


def check_examples(
    examples: FlatExamples, path: Path, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig"
) -> None:
    """Check every token id and every length.

    Raises:
        DataError: for the first line that exceeds a bound; the message names the line, its value and the bound.
    """
    ids = torch.frombuffer(examples.arrays["ids"], dtype=torch.int32)
    ends = torch.frombuffer(examples.arrays["ends"], dtype=torch.int64)
    n, limit = n_embeddings(config), n_positions(config)
    if int(ids.max()) >= n:
        index = int((ids >= n).int().argmax())
        token = int(ids[index])
        line = examples.arrays["lines"][int(torch.searchsorted(ends, index, right=True))]
        raise DataError(
            f"{path} line {line}: its token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, the base "
            f"model knows the ids 0 to {n - 1}: {REMEDY}",
            about="token",
        )
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    if limit is not None and int(lengths.max()) > limit:
        index = int((lengths > limit).int().argmax())
        raise DataError(
            f"{path} line {examples.arrays['lines'][index]}: it has {int(lengths[index])} tokens, the base model has "
            f"{limit} positions: shorten the row, or lower max_length to {limit} (fedmoe expert set)",
            about="max_length",
        )
