"""FedMoE: asynchronous federated fine-tuning of LoRA experts over nothing but a Redis.

    with fedmoe.join("redis://…", {"sql_expert": peft_model}) as member: …    # train, with a loop of your own
    fedmoe.connect("redis://…").expert("sql_expert").weights()                # read

`fedmoe.integrations.transformers.FedMoECallback` makes a transformers Trainer a worker. What `__all__` names is the
public API: it changes only together with CHANGELOG.md. Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FedMoEError", "Member", "RedisSettings", "__version__", "connect", "join"]

if TYPE_CHECKING:
    from fedmoe.errors import FedMoEError
    from fedmoe.settings import RedisSettings
    from fedmoe.tools.reader import connect
    from producers.member import Member, join

_HOME = {
    "FedMoEError": "fedmoe.errors",
    "Member": "producers.member",
    "RedisSettings": "fedmoe.settings",
    "connect": "fedmoe.tools.reader",
    "join": "producers.member",
}


if not TYPE_CHECKING:  # a type checker shall find misspelled names

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first used."""
        if name not in _HOME:
            raise AttributeError(f"module 'fedmoe' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
