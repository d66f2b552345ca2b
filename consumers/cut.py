"""An exported adapter, cut to a lower rank: some programs that serve adapters take only certain ranks."""

from dataclasses import replace

from consumers.merge import Expert, merge
from fedmoe.errors import SpecError
from fedmoe.export import Export
from fedmoe.layout import layout_of, values_of


def cut_to_rank(adapter: Export, rank: int) -> tuple[Export, str]:
    """The nearest adapter of at most that rank, at the same alpha / rank, and a sentence that says what it costs.

    Raises:
        SpecError: if its file or its configuration is not that of a LoRA adapter.
    """
    try:
        has, alpha = int(adapter.config["r"]), float(adapter.config["lora_alpha"])
        scaling = alpha / has
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SpecError(f"the configuration of {adapter.name} names no rank and alpha ({error!r})") from error
    if has <= rank:
        return adapter, f"{adapter.name} has rank {has}: nothing is cut off"
    layout = layout_of(adapter.file)
    whole = Expert(layout=layout, flat=values_of(layout, adapter.file), scaling=scaling, weight=1.0)
    cut = merge([whole], method="svd", rank=rank)
    assert cut.relative_error is not None  # svd knows it
    config = dict(adapter.config) | {"r": rank, "lora_alpha": scaling * rank}
    info = dict(adapter.info) | {"cut_from_rank": has, "cut_relative_error": cut.relative_error}
    told = f"{adapter.name} is cut from rank {has} to {rank}: it differs from the whole by {cut.relative_error:.2%}"
    return replace(adapter, file=bytes(cut.buffer.file), config=config, info=info), told
