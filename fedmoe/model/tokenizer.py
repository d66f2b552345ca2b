"""The base model's tokenizer and the chat template with which it formats rows."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fedmoe.data.template import TEMPLATE_ERRORS
from fedmoe.errors import BaseModelError, SettingsError
from fedmoe.model.base import why_not
from fedmoe.model.local import TOKENIZER_FILES, local_file
from fedmoe.protocol.identity import tokenizer_components, tokenizer_text
from fedmoe.util.template_file import template_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIAL = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"})
# Vocabularies and their rules differ in words, case, numbers, white space and other scripts.
_SAMPLE = "The  quick\tbrown fox, 12345 + 3.14;\n\n  def f(x): return x**2  # ÄÖ ß naïve 日本語 Привет 🙂"
_SPECIAL = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def load_tokenizer(base_model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory or hub id.

    Raises:
        BaseModelError: if it cannot be loaded.
    """
    cached = next(filter(None, (local_file(base_model, name) for name in TOKENIZER_FILES)), None)
    try:
        # A cached tokenizer is loaded as a directory, because transformers would use the network for its id.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            cached.parent if cached else base_model, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many unrelated types
        raise BaseModelError(
            why_not(base_model, error, "the tokenizer of the base model"), about="tokenizer"
        ) from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The components of a tokenizer that change the tokens of a row, each with a digest.

    A missing template is no component, because another worker may contribute one.
    """
    added = {str(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
    # The unknown token is left out: with every byte in the vocabulary it is unused, else the sample shows it.
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
    """The vocabulary component of `tokenizer_fingerprint`, for a training that formats and pads its rows itself."""
    return tokenizer_text(
        {"vocabulary": tokenizer_components(tokenizer_fingerprint(tokenizer))["vocabulary"]}
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def use_template(
    tokenizer: "PreTrainedTokenizerBase", *, expert: str, expert_template: str, own: str, base_model: str
) -> None:
    """Set the tokenizer's template: the expert's, else `own`, else the base model's.

    Raises:
        SettingsError: if there is no template, or `own` is not the expert's.
    """
    if own and expert_template and own != expert_template:
        raise SettingsError(
            f"--chat-template is not the template that expert {expert!r} is trained with: start without this option",
            about="template",
        )
    if own:
        check_template(own)
    if expert_template or own:
        tokenizer.chat_template = expert_template or own
    if not tokenizer.chat_template:
        raise SettingsError(
            f"neither the base model {base_model} nor expert {expert!r} has a chat template: give the Jinja template "
            "used at inference (--chat-template FILE); it becomes the expert's",
            about="chat_template",
        )


def check_template(template: str) -> None:
    """Check a template by rendering one question and one answer.

    Raises:
        SettingsError: if the template fails, or leaves out one of the two.
    """
    conversation: list[Any] = [dict(turn) for turn in _TRIAL]
    try:
        rendered, _ = render_jinja_template([conversation], chat_template=template, **_SPECIAL)
    except TEMPLATE_ERRORS as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingsError(
            f"the chat template cannot render a question and its answer ({words}): correct the --chat-template file",
            about="chat_template",
        ) from error
    for turn in _TRIAL:
        if turn["content"] not in rendered[0]:
            raise SettingsError(
                f"the chat template drops the {turn['role']}'s turn: correct the --chat-template file",
                about=turn["role"],
            )
