"""`python -m fedmoe.model.describe`: the adapter's layout and the identity of the base model, as JSON on stdout.

This is a separate process, because an aggregator needs transformers and peft only when it creates an expert.
"""

import contextlib
import json
import sys
from typing import Any

from fedmoe.errors import FedMoEError, SettingsError
from fedmoe.protocol.lora import LoraSettings


def describe(
    base_model: str, lora: LoraSettings, *, chat_template: str = "", max_length: int = 0, read_weights: bool
) -> dict[str, Any]:
    """Describe base model and adapter; structure and layout come from the config alone.

    The fingerprint is "" if the weights may not be read or are not on this machine; that of the tokenizer has the
    components that are on this machine. `template_missing` is true if the tokenizer is on this machine, and neither it
    nor the request has a chat template.
    """
    from fedmoe.model.adapter import plan_adapter
    from fedmoe.model.base import fingerprint, has_weights, load_base, load_config, structure
    from fedmoe.model.bounds import check_max_length, check_padding
    from fedmoe.model.local import has_tokenizer
    from fedmoe.model.tokenizer import check_template, load_tokenizer, tokenizer_fingerprint
    from fedmoe.protocol.identity import tokenizer_text
    from fedmoe.util.template_file import template_digest

    if chat_template:
        check_template(chat_template)
    config = load_config(base_model)
    check_max_length(max_length, config, base_model)
    plan = plan_adapter(config, lora)
    missing, print_of_weights = False, ""
    print_of_tokenizer = tokenizer_text({"template": template_digest(chat_template)}) if chat_template else ""
    if has_tokenizer(base_model):
        tokenizer = load_tokenizer(base_model)
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        check_padding(tokenizer, config, base_model)
        missing = not tokenizer.chat_template
        print_of_tokenizer = tokenizer_fingerprint(tokenizer)
    if read_weights and has_weights(base_model):
        import torch

        model = load_base(base_model, device=torch.device("cpu"), dtype="auto")
        print_of_weights = fingerprint(model)
    return {
        "base_config": structure(config),
        "layout": [[name, list(shape)] for name, shape in plan.layout.tensors],
        "towers": plan.towers,
        "reach": plan.reach.share,
        "not_reached": plan.reach.not_reached,
        "fingerprint": print_of_weights,
        "tokenizer": print_of_tokenizer,
        "template_missing": missing,
    }


def main() -> None:
    """Read the request from stdin, write the answer as the last line of stdout."""
    request = json.load(sys.stdin)
    lora = LoraSettings(rank=request["rank"], alpha=request["alpha"], targets=tuple(request["targets"]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = describe(
                request["base_model"], lora,
                chat_template=request["chat_template"], max_length=request["max_length"],
                read_weights=request["read_weights"],
            )  # fmt: skip
    except FedMoEError as error:
        answer = {"error": str(error), "about": error.about, "of_settings": isinstance(error, SettingsError)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
