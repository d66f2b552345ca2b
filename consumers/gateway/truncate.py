"""Truncates an exported adapter to a lower rank: some serving programs accept only certain ranks."""

from dataclasses import replace

from consumers.gateway.merge import MergeInput, merge
from fedmoe.errors import SpecError
from fedmoe.protocol.layout import layout_of, values_of
from fedmoe.tools.export import Export


def truncate_to_rank(adapter: Export, rank: int) -> tuple[Export, str]:
    """The nearest adapter of at most that rank, with the same alpha / rank, and a sentence about its error.

    Raises:
        SpecError: if its file or its configuration is not that of a LoRA adapter.
    """
    try:
        has, alpha = int(adapter.config["r"]), float(adapter.config["lora_alpha"])
        scaling = alpha / has
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SpecError(
            f"the configuration of {adapter.name} has no valid r and lora_alpha ({error!r}): was it changed in Redis?",
            about="r",
        ) from error
    if has <= rank:
        return adapter, f"{adapter.name} has rank {has}: nothing is truncated"
    layout = layout_of(adapter.file)
    whole = MergeInput(layout=layout, flat=values_of(layout, adapter.file), scaling=scaling, weight=1.0)
    truncated = merge([whole], method="svd", rank=rank)
    config = dict(adapter.config) | {"r": rank, "lora_alpha": scaling * rank}
    info = dict(adapter.info) | {
        "truncated_from_rank": has,
        "truncation_relative_error": truncated.relative_error,
    }
    text = (
        f"{adapter.name}: truncated from rank {has} to {rank}, relative error {truncated.relative_error:.2%}"
    )
    return replace(adapter, file=bytes(truncated.buffer.file), config=config, info=info), text
