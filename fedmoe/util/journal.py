"""Levels for systemd's journal: a line on stderr that begins with `<3>` is stored as an error (sd-daemon(3)).

systemd sets JOURNAL_STREAM to the device and inode of the stream that leads to the journal; elsewhere nothing is added.
"""

import logging
import os

STDERR = 2
ERROR = 3  # of syslog(3)
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, ERROR), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def is_journal(descriptor: int) -> bool:
    """True if what is written to this file descriptor goes to the journal."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def priority_of(level: int) -> int:
    """The priority of syslog for a level of logging."""
    return next(priority for least, priority in _PRIORITIES if level >= least)


def marked(text: str, priority: int) -> str:
    """The text with the priority before each line."""
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def for_stderr(text: str) -> str:
    """An error's text, marked as an error if stderr is the journal."""
    return marked(text, ERROR) if is_journal(STDERR) else text


def leveled(text: str, level: int) -> str:
    """A record's text, marked with its level (of logging) if stderr is the journal."""
    return marked(text, priority_of(level)) if is_journal(STDERR) else text
