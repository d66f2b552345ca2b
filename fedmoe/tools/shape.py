"""What an export is given beside the values from Redis: another dtype, a served base model's name, its tokenizer."""

from dataclasses import replace

from fedmoe.errors import BaseModelError
from fedmoe.model.local import has_tokenizer
from fedmoe.protocol.layout import layout_of
from fedmoe.tools.export import Export


def as_bf16(export: Export) -> Export:
    """The adapter with its values rounded to the nearest bf16, relative error at most 2⁻⁸ each."""
    return replace(export, file=layout_of(export.file).bf16_file(export.file), dtype="bf16")


def with_base_name(export: Export, name: str) -> Export:
    """The adapter with `name` as its base model's, which vLLM's resolver compares with the name that it serves."""
    return replace(export, config=dict(export.config) | {"base_model_name_or_path": name})


def with_tokenizer(export: Export, base_model: str = "") -> tuple[Export, str]:
    """The adapter with its tokenizer's files; without, and why, if the spec's base model is not on this machine.

    Args:
        export: the adapter.
        base_model: hub id or directory of the base model on this machine; "" is as the spec says.

    Raises:
        BaseModelError: if `base_model` is given and has not the tokenizer that the workers have.
    """
    name = base_model or str(export.info["base_model"])
    if not base_model and not has_tokenizer(name):  # without importing transformers, which takes seconds
        return export, f"the base model {name} is not on this machine; --base-model says where it is"
    from fedmoe.tools.tokenizer_files import tokenizer_files

    try:
        return replace(export, extra=tokenizer_files(export, name)), ""
    except BaseModelError as error:
        if base_model:
            raise
        return export, str(error)
