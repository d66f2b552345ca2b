"""Brings an exported adapter to another rank: some serving programs accept only certain ranks."""

from dataclasses import replace

from consumers.gateway.merge import LORA_B, MergeInput, merge
from fedmoe.errors import SpecError
from fedmoe.protocol.layout import AdapterBuffer, Layout, layout_of, values_of
from fedmoe.protocol.lora import alpha_at
from fedmoe.tools.export import Export


def at_rank(adapter: Export, rank: int) -> tuple[Export, str]:
    """The adapter at this rank, with the same alpha / rank, and a sentence about it.

    A higher rank is reached with zeros, so ΔW = s B A stays the same in every module; a lower one by truncated SVD,
    which gives the nearest ΔW of that rank (Eckart and Young 1936).

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
    if has == rank:
        return adapter, f"{adapter.name} has rank {rank} already"
    layout = layout_of(adapter.file)
    config = dict(adapter.config) | {"r": rank, "lora_alpha": alpha_at(scaling, rank)}
    if has < rank:
        padded = _padded(layout, adapter.file, rank)
        info = dict(adapter.info) | {"padded_from_rank": has}
        text = f"{adapter.name}: padded with zeros from rank {has} to {rank}, which changes nothing else"
        return replace(adapter, file=padded, config=config, info=info), text
    whole = MergeInput(layout=layout, flat=values_of(layout, adapter.file), scaling=scaling, weight=1.0)
    truncated = merge([whole], method="svd", rank=rank)
    info = dict(adapter.info) | {
        "truncated_from_rank": has,
        "truncation_relative_error": truncated.relative_error,
    }
    text = (
        f"{adapter.name}: truncated from rank {has} to {rank}, relative error {truncated.relative_error:.2%}"
    )
    return replace(adapter, file=bytes(truncated.buffer.file), config=config, info=info), text


def _padded(layout: Layout, file: bytes, rank: int) -> bytes:
    """The file with zeros as further rows of each A (r, n) and further columns of each B (m, r)."""
    higher = Layout(
        tuple(
            (name, (shape[0], rank) if name.endswith(LORA_B) else (rank, shape[1]))
            for name, shape in layout.tensors
        )
    )
    buffer = AdapterBuffer(higher)
    views = layout.views(values_of(layout, file))
    for name, target in higher.views(buffer.flat).items():
        rows, columns = views[name].shape
        target[:rows, :columns] = views[name]
    return bytes(buffer.file)
