"""Reads a chat template from a text file, checks its size and gives its digest; `fedmoe.model.tokenizer` renders it."""

import hashlib
from pathlib import Path

from fedmoe.errors import SettingsError

MAX_TEMPLATE_CHARS = 64 * 1024  # three times the longest template of a known model


def read_template(path: Path) -> str:
    """The Jinja text in `path`, without its last line feed, which Jinja drops too.

    Raises:
        SettingsError: if it cannot be read, is empty, or longer than MAX_TEMPLATE_CHARS.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"the chat template {path} is not UTF-8 text: save it as UTF-8", about="UTF-8"
        ) from error
    except OSError as error:
        raise SettingsError(
            f"the chat template {path} cannot be read ({error.strerror or error}): "
            "give --chat-template a file with Jinja text",
            about="file",
        ) from error
    if not text.strip():
        raise SettingsError(
            f"the chat template {path} is empty: give --chat-template a file with Jinja text",
            about="chat_template",
        )
    if len(text) > MAX_TEMPLATE_CHARS:
        raise SettingsError(
            f"the chat template {path} has {len(text)} characters, at most {MAX_TEMPLATE_CHARS} are allowed: "
            "is it the right file?",
            about="length",
        )
    return text.removesuffix("\n")


def template_digest(text: str) -> str:
    """Digest of a template: 12 hex digits; "none" for no template."""
    return hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()[:12] if text else "none"
