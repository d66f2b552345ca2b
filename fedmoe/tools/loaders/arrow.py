"""Answers a prompt with peft's Arrow over the experts.

    python load.py "How many users are there?" [BASE]

BASE is the base model's id or directory, if it is not the one that router.json names. Needs torch, transformers, peft.
"""

import json
import sys
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)
HERE = Path(__file__).resolve().parent
router = json.loads((HERE / "router.json").read_text())
base = sys.argv[2] if len(sys.argv) > 2 else router["base_model"]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.chat_template = router["chat_template"] or tokenizer.chat_template
config = ArrowConfig(top_k=router["top_k"], rng_seed=router["rng_seed"])
places = [str(HERE / "experts" / name) for name in router["experts"]]
model = create_arrow_model(AutoModelForCausalLM.from_pretrained(base), places, config).eval()


def end_ids() -> list[int]:
    """The tokens that end an answer: the base model's own, and the one that the chat template writes after it."""
    own, marker = model.generation_config.eos_token_id, "the answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker}]
    after = str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(marker)[2]
    tokens = tokenizer(after, add_special_tokens=False).input_ids
    ends = [token for token in tokens if token in tokenizer.added_tokens_decoder][:1]
    return ends + (own if isinstance(own, list) else [own] if own is not None else [])


@torch.no_grad()
def answer(prompt: str, max_new_tokens: int = 64) -> str:
    """The answer, for which each token takes in each layer the expert that it is most like."""
    chat = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    written = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_ids() or None
    )
    tokens = written[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    print(answer(sys.argv[1]))
