"""Load an exported gateway (or expert) with PEFT, and let it write.

fedmoe gateway export --out gw
python examples/load_gateway.py gw "How many users are there?"
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print what the model answers."""
    parser = argparse.ArgumentParser(description="Load an exported adapter with PEFT, and let it write.")
    parser.add_argument("adapter", type=Path, help="directory that `fedmoe gateway export --out` wrote")
    parser.add_argument("prompt", help="what a user says")
    parser.add_argument("--base-model", help="directory or hub id  [the one that the adapter names]")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of the answer  [64]")
    args = parser.parse_args()

    # The link is followed once: all files are then of one version, even if an export replaces it meanwhile.
    adapter = (args.adapter / ".fedmoe" / "current").resolve(strict=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    base_model = args.base_model or config["base_model_name_or_path"]

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    template = adapter / "chat_template.jinja"  # there if the experts have one of their own
    if template.exists():
        tokenizer.chat_template = template.read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(adapter)).eval()

    conversation = [{"role": "user", "content": args.prompt}]
    encoded = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    # Answers are trained to end as the chat template ends them; a base model's own settings may not name that token.
    answered = [*conversation, {"role": "assistant", "content": "the answer"}]
    after = str(tokenizer.apply_chat_template(answered, tokenize=False)).partition("the answer")[2]
    tokens = tokenizer(after, add_special_tokens=False).input_ids
    ends = [token for token in tokens if token in tokenizer.added_tokens_decoder][:1]
    own = model.generation_config.eos_token_id
    ends += own if isinstance(own, list) else [own] if own is not None else []
    with torch.inference_mode():
        written = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=ends or None
        )
    print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
