"""The first tokens of a long text, without tokenizing all of it."""

import re
from collections.abc import Callable

CHARS_A_TOKEN = 8  # more than most texts have per token
MIN_CHARS = 4096
MAX_WORD_CHARS = 1000
TAIL_TOKENS = 64  # near a cut inside a word, where tokens may differ from those of the whole text
_WORD_END = re.compile(r"(?<=[^\W_]) ")


def first_tokens(tokenize: Callable[[str], list[int]], text: str, enough: int) -> list[int]:
    """Return all tokens of the text, or the first tokens of a long text: at least `enough` + TAIL_TOKENS.

    A tokenizer takes some 200 bytes per character, and a row may have millions of characters. The text is cut at the
    end of a word, because the text after it does not change the tokens before it.
    """
    size = max(CHARS_A_TOKEN * enough, MIN_CHARS)
    while size < len(text):
        border = _WORD_END.search(text, size, size + MAX_WORD_CHARS)
        tokens = tokenize(text[: border.start() if border else size])
        if len(tokens) >= enough + TAIL_TOKENS:
            return tokens
        size *= 4
    return tokenize(text)
