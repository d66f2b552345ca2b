"""`python -m fedmoe.model.describe`: the adapter's layout and the base model's fingerprint, as JSON on stdout.

A process of its own, since transformers and peft are needed only here and only when an expert is created.
"""

import contextlib
import json
import sys
from typing import Any

from fedmoe.errors import FedMoEError
from fedmoe.spec import LoraSettings


def describe(base_model: str, lora: LoraSettings, *, read_weights: bool) -> dict[str, Any]:
    """Structure and layout from the config alone; the fingerprint if the weights may be read and are here, else ""."""
    from fedmoe.model.adapter import adapter_layout
    from fedmoe.model.base import fingerprint, has_weights, load_base, load_config, structure

    config = load_config(base_model)
    layout = adapter_layout(config, lora)
    print_of_weights = ""
    if read_weights and has_weights(base_model):
        import torch

        model, _ = load_base(base_model, device=torch.device("cpu"), dtype="auto")
        print_of_weights = fingerprint(model)
    return {
        "base_config": structure(config),
        "layout": [[name, list(shape)] for name, shape in layout.tensors],
        "fingerprint": print_of_weights,
    }


def main() -> None:
    """Read the request from stdin, write the answer as the last line of stdout."""
    request = json.load(sys.stdin)
    lora = LoraSettings(rank=request["rank"], alpha=request["alpha"], targets=tuple(request["targets"]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = describe(request["base_model"], lora, read_weights=request["read_weights"])
    except FedMoEError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
