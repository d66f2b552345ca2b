"""The losses that are known of an expert's present version: the one home of where they are read. Pure."""

import math

from fedmoe.protocol.records import Meta


def training_loss(meta: Meta) -> float | None:
    """The training loss that the last applied update reported (nats per token), None if there is none."""
    return meta.loss if math.isfinite(meta.loss) else None


def validation_loss(meta: Meta) -> float | None:
    """The loss on held-out rows of the expert's workers (nats per token), None if nobody measured it.

    It is a field of `meta` that an aggregator without this measurement does not write.
    """
    loss = getattr(meta, "validation_loss", None)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None
