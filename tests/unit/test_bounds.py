"""Token ids beyond the embedding and rows beyond the context are found before anything is trained."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, GPT2Config, MambaConfig, Qwen2Config

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.examples import make_examples
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import open_data
from fedmoe.errors import BaseModelError, DataError, SettingsError
from fedmoe.model.bounds import check_examples, check_max_length, check_padding, n_positions
from fedmoe.model.describe import describe
from fedmoe.protocol.lora import LoraSettings
from tests.errors import raises
from tests.tiny import tiny_config, tiny_tokenizer


def examples_of(path: Path, rows: Iterable[dict[str, str]], tokenizer: Any, max_length: int) -> FlatExamples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad_rows = BadRows(report=print, file=None, fail=False)
    return make_examples(open_data(path, bad_rows), tokenizer, max_length, bad_rows).examples


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    """By line, text, id and bound: the embedding's lookup would end in an IndexError, or in rubbish on a GPU."""
    rows = [{"prompt": f"what is {word}?", "completion": "x"} for word in ("this", "that", "<|extra|>", "it")]
    tokenizer, path = tiny_tokenizer(), tmp_path / "rows.jsonl"
    check_examples(examples_of(path, rows, tokenizer, 64), path, tokenizer, tiny_config())
    tokenizer.add_tokens(["<|extra|>"])
    with pytest.raises(
        DataError,
        match=r"rows.jsonl line 3: its token '<\|extra\|>' has the id 259, .* knows the ids 0 to 258",
    ):
        check_examples(examples_of(path, rows, tokenizer, 64), path, tokenizer, tiny_config())


def test_a_row_beyond_the_positions_is_named(tmp_path: Path) -> None:
    """By line, length and bound: a model with rotary positions would train on it silently."""
    rows = [{"prompt": "p" * length, "completion": "x"} for length in (3, 40, 2)]
    tokenizer, path = tiny_tokenizer(), tmp_path / "rows.jsonl"
    examples = examples_of(path, rows, tokenizer, 128)
    config = tiny_config()
    config.max_position_embeddings = longest = max(len(example.input_ids) for example in examples)
    check_examples(examples, path, tokenizer, config)
    config.max_position_embeddings = longest - 1
    with pytest.raises(
        DataError, match=rf"line 2: it has {longest} tokens, the base model has {longest - 1} pos"
    ):
        check_examples(examples, path, tokenizer, config)


def test_a_padding_id_beyond_the_embedding_is_named() -> None:
    """Masked or not, it is looked up."""
    tokenizer = tiny_tokenizer()
    check_padding(tokenizer, tiny_config(), "tiny")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with raises(BaseModelError, about="pad_token"):
        check_padding(tokenizer, tiny_config(), "tiny")


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (tiny_config(), 1024),
        (GPT2Config(n_positions=64), 64),
        (MambaConfig(), None),
        (Gemma3Config(), 131072),
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "rope_theta": 1e6,
                },
            ),
            131072,
        ),
    ],
    ids=["qwen2", "gpt2", "mamba", "gemma3", "stretched"],
)
def test_how_many_positions_a_model_has(config: Any, positions: int | None) -> None:
    """Learned or rotary ones, stretched ones, one set for each kind of layer, or none at all."""
    assert n_positions(config) == positions
    check_max_length(positions or 10**9, config, "tiny")
    if positions:
        with raises(SettingsError, about="max_length"):
            check_max_length(positions + 1, config, "tiny")


def test_an_expert_beyond_the_positions_is_not_created(tiny_model_dir: Path) -> None:
    """Nobody could train it."""
    with raises(SettingsError, about="max_length"):
        describe(str(tiny_model_dir), LoraSettings(rank=2), max_length=2048, read_weights=False)
