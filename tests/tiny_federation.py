"""A federation of the tiny model: experts with random weights, and rows for them."""

import json
from collections.abc import Sequence
from pathlib import Path

from consumers.gateway.builder import GatewayBuilder
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from tests.federation import first_meta
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model

RULES = RuleSet(training=TrainingSettings(learning_rate=5e-3, batch_size=4, warmup_steps=0))


def make_federation(
    connection: Connection,
    base: Path,
    names: Sequence[str] = ("red", "blue"),
    *,
    scale: float = 0.05,
    rank: int = 4,
) -> None:
    """Experts of the tiny model with random weights, and a gateway; with scale 0 they are as the base model."""
    config, lora = tiny_config(), LoraSettings(rank=rank)
    layout = adapter_layout(config, lora)
    spec = Spec(base_model=str(base), base_config=structure(config), layout=layout, lora=lora)
    for seed, name in enumerate(names):
        buffer = AdapterBuffer(layout)
        buffer.flat.copy_(initial_weights(layout, 0)).add_(randn(seed, layout.numel), alpha=scale)
        meta = first_meta(
            spec,
            version=seed + 3,
            base_fingerprint=fingerprint(tiny_model()),
            rules=RULES,
            n_examples=20 * seed,
        )
        ExpertStore(connection, name).create(spec, meta, buffer.file, gateway_weight=1.0)
    GatewayBuilder(connection, GatewaySettings(), holder="agg-1", lease_s=5.0).refresh()


def write_rows(path: Path, answer: str, n_rows: int = 6) -> Path:
    rows = [{"prompt": f"what {n}", "completion": f"{answer} {n}"} for n in range(n_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
