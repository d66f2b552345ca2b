"""Rows from the Python reference that each interpreter has for `help()`: a paragraph → the next one."""

import re
import textwrap
from collections.abc import Iterator, Mapping

from fedmoe.demo.corpus_rows import Row

MIN_CHARS, MAX_PROMPT_CHARS, MAX_COMPLETION_CHARS = 60, 260, 360
_UNDERLINE = re.compile(r'[*=\-^"~]{3,}')
_TABLE_OR_FOOTNOTE = re.compile(r"\+[-=]|\||\[\d+\]")


def docs_rows(topics: Mapping[str, str]) -> Iterator[Row]:
    """Yield a row for each pair of neighbouring paragraphs of a section, topic by topic.

    `topics` is that of `pydoc_data.topics`: topic → plain text with underlined headings.
    """
    for topic in sorted(topics):
        section, before = topic, ""
        for block in re.split(r"\n\s*\n", topics[topic]):
            lines = block.strip("\n").splitlines()
            if len(lines) == 2 and _UNDERLINE.fullmatch(lines[1]):
                section, before = lines[0], ""
                continue
            paragraph = textwrap.dedent("\n".join(lines))
            if _usable(before, MAX_PROMPT_CHARS) and _usable(paragraph, MAX_COMPLETION_CHARS):
                yield Row(
                    prompt=f'Continue the section "{section}" of the Python reference.\n\n{before}',
                    completion=paragraph,
                    source=topic,
                )
            before = paragraph


def _usable(paragraph: str, max_chars: int) -> bool:
    return MIN_CHARS <= len(paragraph) <= max_chars and not _TABLE_OR_FOOTNOTE.match(paragraph)
