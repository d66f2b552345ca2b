"""Answers a prompt with the expert whose domain it belongs to.

    python load.py "How many users are there?" [BASE]

BASE is the base model's id or directory, if it is not the one that router.json names. Needs torch, transformers, peft.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)
HERE = Path(__file__).resolve().parent
router = json.loads((HERE / "router.json").read_text())
base = sys.argv[2] if len(sys.argv) > 2 else router["base_model"]
tokenizer, names = AutoTokenizer.from_pretrained(base), router["experts"]
places = [HERE / "experts" / name for name in names]
own = tokenizer.chat_template or ""
ours: str = router["chat_template"] or (own["default"] if isinstance(own, dict) else own)
files = [place / "chat_template.jinja" for place in places]
templates = [file.read_text() if file.exists() else ours for file in files]  # each expert's own
model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base), HERE, adapter_name="gateway"
).eval()
for number, place in enumerate(places):
    model.load_adapter(place, adapter_name=f"expert_{number}")
vectors = load_file(HERE / "router.safetensors")["vectors"]  # one row for each expert


def end_ids() -> list[int]:
    """The tokens that end an answer: the base model's own, and the one that the chat template writes after it."""
    own, marker = model.generation_config.eos_token_id, "the answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker}]
    after = str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(marker)[2]
    tokens = tokenizer(after, add_special_tokens=False).input_ids
    ends = [token for token in tokens if token in tokenizer.added_tokens_decoder][:1]
    return ends + (own if isinstance(own, list) else [own] if own is not None else [])


def tokens_of(prompt: str, template: str) -> dict[str, torch.Tensor]:
    """The prompt as this chat template writes it."""
    tokenizer.chat_template = template
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def state_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The base model's last hidden state at the end of the prompt, of norm 1."""
    with model.disable_adapter():
        state = model.get_base_model().base_model(**inputs).last_hidden_state[0, -1].float()
    return torch.nn.functional.normalize(state, dim=0)


@torch.no_grad()
def answer(prompt: str, max_new_tokens: int = 64) -> tuple[str, str]:
    """The expert to which the prompt belongs, and its answer."""
    states = {template: state_of(tokens_of(prompt, template)) for template in dict.fromkeys(templates)}
    distances = [
        (states[template] - vector).norm() for template, vector in zip(templates, vectors, strict=True)
    ]
    nearest = distances.index(min(distances))
    inputs = tokens_of(prompt, templates[nearest])
    model.set_adapter(f"expert_{nearest}")
    written = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_ids() or None
    )
    tokens = written[0, inputs["input_ids"].shape[1] :]
    return names[nearest], tokenizer.decode(tokens, skip_special_tokens=True)


if __name__ == "__main__":
    print("{}: {}".format(*answer(sys.argv[1])))
