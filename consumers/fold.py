"""The one step that changes an expert: `weights += factor × Δ`. Pure."""

import torch


def fold(
    weights: torch.Tensor, delta: torch.Tensor, factor: float, *, out: torch.Tensor | None = None
) -> None:
    """Write `weights + factor × delta` to `out`, all (n,) fp32; to `weights` itself if no `out` is given.

    `factor` is lr × decay(staleness). Updates are folded one after the other in stream order, and each value on its
    own: a batch gives bit for bit what the same updates give one by one, and part by part what they give whole.

    Source: FedBuff, arXiv 2106.06639, with a buffer of one.
    """
    torch.add(weights, delta, alpha=factor, out=weights if out is None else out)
