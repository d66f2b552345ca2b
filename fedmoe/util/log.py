"""The log: one line or one JSON object for each message, without control characters and without passwords.

Only FedMoE's own loggers speak at the chosen level. Libraries speak from WARNING on, and those that warn their own
authors from ERROR on.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from datetime import UTC, datetime

from fedmoe.util.journal import for_stderr, leveled
from fedmoe.util.text import printable_lines

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
OURS = ("fedmoe", "producers", "consumers")
SYNC = "sync "  # the first part of a thread's name; the rest is the expert with which a worker's thread is in sync
_TALKATIVE = ("transformers", "httpx", "huggingface_hub", "urllib3")
_LOGIN = re.compile(r"(\w://)\S*@")
_SECRET = re.compile(r"(?i)((?:password|secret|token|api[_-]?key)=)[^\s&'\"]+")

logger = logging.getLogger("fedmoe")


def harmless(text: str) -> str:
    """Text for a log: control characters are escaped, and the login of a URL and passwords in options are masked."""
    return _SECRET.sub(r"\1***", _LOGIN.sub(r"\1***@", printable_lines(text)))


class TextFormatter(logging.Formatter):
    """Lines such as `2026-01-31T12:00:00Z INFO sql_expert: serving from version 3`."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record; for systemd's journal each has its level."""
        return leveled(super().format(record), record.levelno)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line without a traceback; what a worker's sync logs begins with its expert, for it may train two."""
        record.message = harmless(record.message)
        if (record.threadName or "").startswith(SYNC):
            record.message = f"{harmless(str(record.threadName)).removeprefix(SYNC)}: {record.message}"
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802  # logging's name
        """The traceback, which may quote text of others."""
        return harmless(super().formatException(ei))  # type: ignore[arg-type]  # as logging passes it


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `time`, `level`, `logger`, `thread`, `message`, `exception` (if there is one).

    `time` is UTC as in RFC 3339, with milliseconds; the thread of an aggregator has the name of its expert.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The object of a record."""
        content = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": harmless(str(record.threadName)),
            "message": harmless(record.getMessage()),
        }
        if record.exc_info:
            content["exception"] = harmless(self.formatException(record.exc_info))
        return leveled(json.dumps(content), record.levelno)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def start_log(level: str) -> None:
    """Log to stderr as text, from this level on. A program that logs already keeps its handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    set_level(level)


def set_level(level: str) -> None:
    """Let FedMoE's own loggers speak from this level on."""
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())


def set_format(name: str) -> None:
    """Choose `text` or `json` for what `start_log` began; as JSON, warnings and what ends a thread are logged, too."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, TextFormatter | JsonFormatter):
            handler.setFormatter(JsonFormatter() if name == "json" else TextFormatter())
    if is_json():
        logging.captureWarnings(True)
        threading.excepthook = _log_end_of_thread


def is_json() -> bool:
    """True if the log is JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def say(text: str, *, err: bool = False) -> None:
    """Print a line for people, on stdout or stderr; if the log is JSON, log it, so that all output is JSON."""
    if is_json():
        logger.info("%s", text)
    else:
        print(text, file=sys.stderr if err else sys.stdout, flush=True)


def complain(text: str) -> None:
    """Print `fedmoe: text` on stderr, the last line of a command that failed; if the log is JSON, log it."""
    if is_json():
        logger.error("%s", text)
    else:
        print(for_stderr(f"fedmoe: {text}"), file=sys.stderr, flush=True)


def write_last_words(words: str, *, is_error: bool) -> None:
    """Like `say` or `complain`, for the end of a process: a stuck thread may hold the lock of a stream or a logger.

    Raises:
        OSError: if nobody reads it any more.
    """
    text, is_object = for_stderr(f"fedmoe: {words}") if is_error else words, is_json()
    if is_object:
        level = logging.ERROR if is_error else logging.INFO
        text = JsonFormatter().format(logging.LogRecord("fedmoe", level, "", 0, words, (), None))
    if words:
        os.write(2 if is_error or is_object else 1, f"{text}\n".encode(errors="backslashreplace"))


def _log_end_of_thread(end: threading.ExceptHookArgs) -> None:
    if end.exc_type is not SystemExit and end.exc_value is not None:
        logger.critical("unexpected error in a thread", exc_info=end.exc_value)
