"""The base model's tokenizer and the chat template that it writes rows with."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fedmoe.data.template import TEMPLATE_ERRORS
from fedmoe.errors import BaseModelError, SettingsError
from fedmoe.model.base import local_file, why_not
from fedmoe.protocol.identity import tokenizer_components, tokenizer_text
from fedmoe.util.template_file import template_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TRIAL = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"})
# Words, case, numbers, white space, other scripts: what vocabularies and their rules differ in.
_SAMPLE = "The  quick\tbrown fox, 12345 + 3.14;\n\n  def f(x): return x**2  # ÄÖ ß naïve 日本語 Привет 🙂"
_SPECIAL = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def has_tokenizer(base_model: str) -> bool:
    """True if a tokenizer lies in the directory or the local hub cache; asks no network."""
    return any(local_file(base_model, name) for name in TOKENIZER_FILES)


def load_tokenizer(base_model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory or hub id.

    Raises:
        BaseModelError: if it cannot be loaded.
    """
    cached = next(filter(None, (local_file(base_model, name) for name in TOKENIZER_FILES)), None)
    try:
        # From the cache as a directory: by its id, transformers would ask the network all the same.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            cached.parent if cached else base_model, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many unrelated types
        raise BaseModelError(why_not(base_model, error, "the tokenizer of the base model")) from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What of a tokenizer makes other tokens of the same rows, component by component.

    A template that is missing is no component: somebody else may bring one.
    """
    added = {str(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
    # The unknown token is the library's choice where the vocabulary has every byte; else it shows in the sample.
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    ids = tokenizer(_SAMPLE, add_special_tokens=False).input_ids
    components = {
        "added": _digest(added),
        "special": _digest(special),
        "vocabulary": f"{len(tokenizer)}-{_digest(ids)}",
    }
    if template := tokenizer.chat_template:
        components["template"] = template_digest(
            template if isinstance(template, str) else json.dumps(template)
        )
    return tokenizer_text(components)


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Only what `tokenizer_fingerprint` says of the vocabulary: for a training that writes and pads its rows itself."""
    return tokenizer_text(
        {"vocabulary": tokenizer_components(tokenizer_fingerprint(tokenizer))["vocabulary"]}
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def use_template(
    tokenizer: "PreTrainedTokenizerBase", *, expert: str, expert_template: str, own: str, base_model: str
) -> None:
    """Have the tokenizer write rows with the expert's template, else with `own`, else with the base model's.

    Raises:
        SettingsError: if there is none, or `own` is not the expert's.
    """
    if own and expert_template and own != expert_template:
        raise SettingsError(
            f"--chat-template is not the template that expert {expert!r} is trained with: start without this option"
        )
    if own:
        check_template(own)
    if expert_template or own:
        tokenizer.chat_template = expert_template or own
    if not tokenizer.chat_template:
        raise SettingsError(
            f"neither the base model {base_model} nor expert {expert!r} has a chat template: give the Jinja template "
            "used at inference (--chat-template FILE); it becomes the expert's"
        )


def check_template(template: str) -> None:
    """Render one question and one answer.

    Raises:
        SettingsError: if the template fails, or leaves one of the two out.
    """
    conversation: list[Any] = [dict(turn) for turn in _TRIAL]
    try:
        rendered, _ = render_jinja_template([conversation], chat_template=template, **_SPECIAL)
    except TEMPLATE_ERRORS as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingsError(
            f"the chat template cannot render a question and its answer ({words}): correct the --chat-template file"
        ) from error
    for turn in _TRIAL:
        if turn["content"] not in rendered[0]:
            raise SettingsError(
                f"the chat template drops the {turn['role']}'s turn: correct the --chat-template file"
            )
