"""The one step that changes an expert: `weights += factor × Δ`. Pure, and in place."""

import torch


def fold(weights: torch.Tensor, delta: torch.Tensor, factor: float) -> None:
    """Add `factor × delta` to `weights`, both (numel,) fp32.

    `factor` is lr × decay(staleness). Updates are folded one after the other in stream order, so that a batch gives
    bit for bit what the same updates give one by one.

    Source: FedBuff, arXiv 2106.06639, with a buffer of one.
    """
    weights.add_(delta, alpha=factor)
