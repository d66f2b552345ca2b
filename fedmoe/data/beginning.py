"""The first tokens of a long text, without the cost of all."""

import re
from collections.abc import Callable

CHARS_A_TOKEN = 8  # more than most texts have
MIN_CHARS = 4096
MAX_WORD_CHARS = 1000
TAIL_TOKENS = 64  # in front of an end inside a word, where they may be others than those of the whole text
_WORD_END = re.compile(r"(?<=[^\W_]) ")


def first_tokens(tokenize: Callable[[str], list[int]], text: str, enough: int) -> list[int]:
    """All tokens of the text, or of a long one the first, but at least `enough` and some more.

    A tokenizer takes some 200 bytes a character, and a row may have millions. The text ends at the end of a word,
    because there what follows makes no difference to the tokens before it.
    """
    size = max(CHARS_A_TOKEN * enough, MIN_CHARS)
    while size < len(text):
        border = _WORD_END.search(text, size, size + MAX_WORD_CHARS)
        tokens = tokenize(text[: border.start() if border else size])
        if len(tokens) >= enough + TAIL_TOKENS:
            return tokens
        size *= 4
    return tokenize(text)
