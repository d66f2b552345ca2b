"""Layouts of real adapters, from their models' shapes alone: no model is loaded."""

from dataclasses import dataclass

from fedmoe.protocol.layout import FLOAT_BYTES, Layout


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer's linear layers: (name, in, out) of each block, and how many blocks there are."""

    blocks: int
    linear: tuple[tuple[str, int, int], ...]


def _decoder(blocks: int, hidden: int, kv: int, inner: int) -> Shape:
    """A decoder as of Llama and Qwen2."""
    return Shape(
        blocks,
        (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, kv),
            ("self_attn.v_proj", hidden, kv),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ),
    )


SMOLLM2_135M = _decoder(30, 576, 192, 1536)
QWEN2_0_5B = _decoder(24, 896, 128, 4864)
LLAMA_7B = _decoder(32, 4096, 4096, 11008)


def lora_layout(shape: Shape, rank: int, targets: tuple[str, ...] = ()) -> Layout:
    """The adapter's tensors, named as PEFT names them; without targets, of all linear layers."""
    tensors = []
    for block in range(shape.blocks):
        for name, n_in, n_out in shape.linear:
            if targets and name.rpartition(".")[2] not in targets:
                continue
            prefix = f"base_model.model.model.layers.{block}.{name}"
            tensors += [
                (f"{prefix}.lora_A.weight", (rank, n_in)),
                (f"{prefix}.lora_B.weight", (n_out, rank)),
            ]
    return Layout.of(tensors)


# Sizes in fp32. 1 MiB: SmolLM2-135M, rank 8 on q_proj; 9: the same on all linear layers, 420 tensors; 34: Qwen2.5-0.5B,
# rank 16 on all linear layers; 153: Llama-7B, the same. 64 KiB is no model's: two tensors, where the cost of an update
# is not that of its bytes.
LAYOUTS = {
    "64kib": Layout.of(
        [("layers.0.q_proj.lora_A.weight", (8, 1024)), ("layers.0.q_proj.lora_B.weight", (1024, 8))]
    ),
    "1mib": lora_layout(SMOLLM2_135M, 8, ("q_proj",)),
    "9mib": lora_layout(SMOLLM2_135M, 8),
    "34mib": lora_layout(QWEN2_0_5B, 16),
    "153mib": lora_layout(LLAMA_7B, 16),
}


def fp32_bytes(layout: Layout) -> int:
    """Bytes of the values."""
    return layout.numel * FLOAT_BYTES
