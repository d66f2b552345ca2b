"""Values that are too large for the server: it closes the connection without giving a reason.

So after a connection broke over a large value, the server's limits are read. If this user may not read them, the
message names the limits that may be the cause.
"""

from collections.abc import Sequence
from typing import Any

import redis

from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.store.client import Words
from fedmoe.store.refusals import keys_of

LARGE_BYTES = 1024 * 1024  # the smallest possible proto-max-bulk-len
OUTPUT = "client-output-buffer-limit"
INPUTS = ("proto-max-bulk-len", "client-query-buffer-limit")
_MIB = 2**20


def too_large(
    client: Any, commands: Sequence[Words], *, url: str, prefix: str
) -> RedisUnavailableError | None:
    """The error for a connection that broke during these commands; None if their size was not the cause.

    Args:
        client: a redis client.
        commands: in flight when the connection broke.
        url: of the server, for people.
        prefix: of the federation's keys.
    """
    written = max(((_longest(words), words) for words in commands), key=lambda pair: pair[0], default=(0, ()))
    reads = [words for words in commands if words[0] in ("GET", "GETRANGE")]
    if written[0] < LARGE_BYTES and not reads:
        return None
    try:
        if written[0] >= LARGE_BYTES:
            key = next(iter(keys_of(written[1], prefix)), "a value")
            return _of_write(client, key, written[0], url)
        return _of_read(client, {key: None for words in reads for key in keys_of(words, prefix)}, url)
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return None  # Redis cannot be reached at all


def _longest(words: Words) -> int:
    return max((len(word) for word in words if isinstance(word, str | bytes | memoryview)), default=0)


def _of_write(client: Any, key: str, n_bytes: int, url: str) -> RedisUnavailableError | None:
    begin = f"{key} is {n_bytes / _MIB:.1f} MiB long, and Redis at {url}"
    limits = _limits(client, *INPUTS)
    if limits is None:
        return RedisUnavailableError(
            f"{begin} ended the connection when it was written: if that happens each time, raise its "
            "proto-max-bulk-len (or what its provider calls the largest request) above that size",
            about=INPUTS[0],
        )
    for name in INPUTS:
        if 0 < (limit := int(limits.get(name, 0))) < n_bytes:
            return RedisUnfitError(
                f"{begin} takes at most {limit / _MIB:.1f} MiB ({name}): raise that "
                f"(redis-cli CONFIG SET {name} {-(-2 * n_bytes // _MIB)}mb, and in redis.conf)",
                about=name,
            )
    return None


def _of_read(client: Any, keys: dict[str, None], url: str) -> RedisUnavailableError | None:
    try:
        n_bytes = sum(int(client.strlen(key)) for key in keys)
    except redis.ResponseError:
        return None
    begin = f"{' and '.join(keys)}: {n_bytes / _MIB:.1f} MiB are read at once, and Redis at {url}"
    limits = _limits(client, OUTPUT)
    if limits is None:
        if n_bytes < LARGE_BYTES:
            return None
        return RedisUnavailableError(
            f"{begin} ended the connection: if that happens each time, raise its {OUTPUT} (for normal clients) above "
            "that size",
            about=OUTPUT,
        )
    words = str(limits.get(OUTPUT, "normal 0 0 0")).split()
    limit = int(words[words.index("normal") + 1])
    if not 0 < limit < n_bytes * 1.25:  # replies take a little more memory than their values
        return None
    return RedisUnfitError(
        f"{begin} keeps at most {limit / _MIB:.1f} MiB for a client ({OUTPUT}): raise that "
        f"(redis-cli CONFIG SET {OUTPUT} 'normal {-(-4 * n_bytes // _MIB)}mb 0 0', and in redis.conf)",
        about=OUTPUT,
    )


def _limits(client: Any, *names: str) -> dict[str, str] | None:
    """Settings of the server, None if this user may not read them."""
    try:
        return dict(client.config_get(*names))
    except redis.ResponseError:
        return None
