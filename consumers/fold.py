"""The one step that changes an expert: `weights += factor × Δ`. Pure."""

import torch


def fold(
    weights: torch.Tensor, delta: torch.Tensor, factor: float, *, out: torch.Tensor | None = None
) -> None:
    """Write `weights + factor × delta` to `out` (default: `weights` itself), all (n,) fp32.

    `factor` is that of the rules for the update's staleness. Updates are folded one after the other in stream order,
    and each value independently: neither batching updates nor folding them part by part changes a bit of the result.

    Source: FedBuff, arXiv 2106.06639, with a buffer of one.
    """
    torch.add(weights, delta, alpha=factor, out=weights if out is None else out)
