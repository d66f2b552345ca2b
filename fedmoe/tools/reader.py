"""The reading side of the Python API: `fedmoe.connect`.

    federation = fedmoe.connect("redis://…")
    expert = federation.expert("sql_expert")
    expert.weights()                         # {tensor name: tensor}, as PEFT names them
    for update in expert.updates(): …        # applied updates, oldest first
    federation.gateway().save("gw")          # PeftModel.from_pretrained(base, "gw")

Each call reads Redis again; nothing here writes to Redis.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load

from fedmoe.protocol import federation
from fedmoe.protocol.lines import AppliedLine, read_line
from fedmoe.protocol.names import check_expert
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.tools.export import Export, read_expert, read_gateway
from fedmoe.tools.export_files import write

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, slots=True)
class Adapter:
    """An expert or the gateway at the moment it was read."""

    _export: Export

    @property
    def versions(self) -> dict[str, int]:
        """Expert -> version: of the expert itself, or of each expert that the gateway was built from."""
        return {name: int(part["version"]) for name, part in self._export.built_from.items()}

    @property
    def config(self) -> dict[str, Any]:
        """Content of PEFT's adapter_config.json."""
        return dict(self._export.config)

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors, fp32 on the CPU, by their names in adapter_model.safetensors."""
        return load(bytes(self._export.file))  # a file that lay in parts is a bytearray

    def save(self, directory: str | Path, *, force: bool = False) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads; see `fedmoe gateway export`.

        Raises:
            SettingsError: if the directory holds other files, unless `force`.
        """
        write(directory, self._export, force=force)


class ExpertReader:
    """One expert of a federation."""

    def __init__(self, store: GatewayStore, name: str) -> None:
        self.name = check_expert(name)
        self._store = store

    @property
    def spec(self) -> Spec:
        """The expert's spec, which never changes. Raises UnknownExpertError, which names the existing experts."""
        return self._store.spec(self.name)

    @property
    def meta(self) -> Meta:
        """The expert's state: version, commit, counters, rules."""
        return self._store.meta(self.name)

    @property
    def rules(self) -> RuleSet:
        """The rules in force: how the expert is aggregated and trained."""
        return self.meta.rules

    def lora_config(self) -> "LoraConfig":
        """The LoraConfig for an adapter that trains this expert (see `fedmoe.join`)."""
        from peft import LoraConfig

        skipped = ("peft_type", "base_model_name_or_path", "inference_mode", "fan_in_fan_out")
        options = {name: value for name, value in self.spec.adapter_config().items() if name not in skipped}
        return LoraConfig(**options)

    def adapter(self) -> Adapter:
        """The expert's weights and configuration."""
        return Adapter(read_expert(self._store, self.name))

    def weights(self) -> dict[str, torch.Tensor]:
        """The expert's tensors, fp32 on the CPU, by their names in adapter_model.safetensors."""
        return self.adapter().weights()

    def updates(self) -> Iterator[AppliedLine]:
        """The applied updates, oldest first, as far back as the expert's log reaches."""
        _, _, lines = self._store.history(self.name)
        for line in map(read_line, lines):
            if isinstance(line, AppliedLine):
                yield line


class FederationReader:
    """Reads a federation. Created by `connect`."""

    def __init__(self, redis: RedisSettings) -> None:
        self._store = GatewayStore(Connection(redis))

    def experts(self) -> dict[str, float]:
        """The experts and their gateway weights, by name."""
        return self._store.experts()

    def expert(self, name: str) -> ExpertReader:
        """One expert, even if it does not exist yet."""
        return ExpertReader(self._store, name)

    def gateway(self, kind: str = "") -> Adapter:
        """The gateway: the trained one if workers trained it, else the merged one.

        Args:
            kind: "trained" or "merged"; "" for the default.

        Raises:
            UnknownExpertError: with the reason, if there is none of that kind yet.
        """
        return Adapter(read_gateway(self._store, kind))

    def view(self) -> federation.Federation:
        """Everything that `fedmoe status` shows: experts, workers, waiting and refused updates."""
        return Inspector(self._store.connection).federation()


def connect(redis: str | RedisSettings) -> FederationReader:
    """A reader of a federation; it needs the rights of a monitor, and of an operator for weights.

    Args:
        redis: URL of the federation's Redis, or its settings. No command is sent yet.

    Raises:
        SettingsError: if the URL cannot work.
    """
    return FederationReader(RedisSettings(url=redis) if isinstance(redis, str) else redis)
