"""Turns an error of Redis or redis-py into one sentence: what is wrong, with which key, and what to do.

RedisUnfitError marks errors that persist until somebody changes the server's settings, this user's rights or a key;
RedisUnavailableError marks all others, which may pass. Pure.
"""

import re
from collections.abc import Sequence

import redis
from redis import exceptions
from redis.sentinel import MasterNotFoundError

from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.store.client import Words, asked
from fedmoe.store.cluster import SlotError
from fedmoe.store.tls import hint_of_silence, tls_problem

_UNKNOWN_COMMAND = re.compile(r"unknown (?:sub)?command [`'\"]?(\w+)|Unknown Redis command")
_REFUSED_COMMAND = re.compile(r"permissions to run the '([^']+)' command")
_IN_SCRIPT = re.compile("user executing the script can't|ACL failure in script")
_NOT_ALLOWED = re.compile(f"NOPERM|{_IN_SCRIPT.pattern}")
_TOO_LONG = re.compile(r"exceeds maximum allowed size|max request size exceeded")
MAX_SHOWN_CHARS = 160
AT_ONCE = (
    "; if it always ends so, it may ask for a client certificate (certificate_file in the enrolment file)"
)


def is_refusal(reply: object) -> bool:
    """True if this user may not run the command, or the server does not have it."""
    return is_not_allowed(reply) or (
        isinstance(reply, redis.ResponseError) and bool(_UNKNOWN_COMMAND.search(str(reply)))
    )


def is_not_allowed(reply: object) -> bool:
    """True if this user may not run the command, or one in its script; the refusal of an EXEC quotes NOPERM."""
    return isinstance(reply, exceptions.NoPermissionError) or (
        isinstance(reply, redis.ResponseError) and bool(_NOT_ALLOWED.search(str(reply)))
    )


def is_broken(error: Exception) -> bool:
    """True if an established connection broke, not if connecting failed."""
    if isinstance(error, redis.WatchError):
        return True
    is_connection = type(error) is redis.ConnectionError or isinstance(error, OSError)
    return is_connection and " connecting to " not in str(error)


def keys_of(command: Words, prefix: str) -> list[str]:
    """The keys of a command: its words that begin with the federation's prefix."""
    words = [word.decode(errors="replace") if isinstance(word, bytes) else word for word in command[1:]]
    return [word for word in words if isinstance(word, str) and word.startswith(f"{prefix}:")]


def command_text(command: Words, prefix: str) -> str:
    """A command for people: its name and its keys, never a value."""
    text = " ".join([str(command[0]), *dict.fromkeys(keys_of(command, prefix))])
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def explain(error: Exception, url: str, prefix: str) -> RedisUnavailableError:
    """The FedMoE error for an error of redis-py: RedisUnfitError if it persists, else RedisUnavailableError.

    Args:
        error: of redis-py, with the sent commands attached (store/client.py).
        url: for people, without login.
        prefix: of the federation's keys.
    """
    text = str(error).strip().rstrip(".") or type(error).__name__
    commands = asked(error)
    if unfit := _unfit(error, text, commands, url, prefix):
        about, sentence = unfit
        return RedisUnfitError(sentence, about=about)
    about, sentence = _passing(error, text, url)
    return RedisUnavailableError(sentence, about=about)


def _unfit(
    error: Exception, text: str, commands: Sequence[Words], url: str, prefix: str
) -> tuple[str, str] | None:
    """What an error is about that persists until somebody acts, and its sentence; None for other errors."""
    command = commands[0] if len(commands) == 1 else ()
    what = command_text(command, prefix) if command else ""
    if isinstance(error, MasterNotFoundError):  # its message already says what each sentinel replied
        return None
    if isinstance(error, SlotError):
        return tls_problem(text, url)
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        return "login", (
            f"Redis at {url} refuses the login ({text}): the password is wrong, or this user was revoked or never "
            "enrolled; check the URL, or ask the operator for a new enrolment file"
        )
    is_connection = isinstance(error, redis.ConnectionError | OSError)
    if is_connection and (found := tls_problem(text, url)):
        return found
    if refused := _refused_right(error, text, what):
        return "rights", (
            f"Redis at {url} does not let this user run {refused}: give it the rights that "
            "`fedmoe doctor --acl ROLE` prints"
        )
    if unknown := _UNKNOWN_COMMAND.search(text):
        name = unknown[1].upper() if unknown[1] else f"that a script of FedMoE uses ({what})"
        return "command", (
            f"Redis at {url} has no command {name}, and FedMoE needs it: take it out of rename-command there, or use "
            "another server (Redis 7.0, Valkey 8, or newer)"
        )
    if _of_a_cluster(error) and not url.startswith("cluster://"):
        return (
            "cluster",
            f"Redis at {url} is a node of a Redis Cluster ({text}): begin the URL with cluster://",
        )
    if "cluster support disabled" in text:
        return "cluster", f"Redis at {url} is no Redis Cluster: begin the URL with redis:// or rediss://"
    if "WRONGTYPE" in text:
        return "key", _wrong_type(keys_of(command, prefix) if command else [], url)
    if _TOO_LONG.search(text):
        return (
            "proto-max-bulk-len",
            f"the value of {what} is too long for Redis at {url} ({text}): raise its proto-max-bulk-len",
        )
    return None


def _refused_right(error: Exception, text: str, what: str) -> str:
    """The command that this user may not run, with its keys if known; "" if the error is not a lacking right."""
    if "EXEC without MULTI" in text:
        return "MULTI"
    in_script = _IN_SCRIPT.search(text)
    if not is_not_allowed(error):
        return ""
    found = _REFUSED_COMMAND.search(text)
    name = found[1].replace("|", " ").upper() if found else ""
    if not what.startswith(name):
        what = name  # the server refused another command than the one attached, for example EXEC
    return f"{what or 'a command'}{' (a command or key inside the script)' if in_script else ''}"


def _wrong_type(keys: Sequence[str], url: str) -> str:
    which = f"the key {' or '.join(dict.fromkeys(keys))}" if keys else "a FedMoE key"
    there = f" (redis-cli RENAME '{keys[0]}' '{keys[0]}.overwritten')" if keys else ""
    return f"{which} in Redis at {url} was overwritten by something else: move it away{there}"


def _of_a_cluster(error: Exception) -> bool:
    kinds = (
        exceptions.AskError,  # and MOVED
        exceptions.ClusterDownError,
        exceptions.ClusterCrossSlotError,
        exceptions.TryAgainError,
    )
    return isinstance(error, kinds) and not isinstance(error, exceptions.MasterDownError)


def _hint_of_tls(error: Exception, text: str, url: str) -> str:
    """What may be wrong with TLS, if an error looks like it; else "".

    A server without TLS does not answer the first message of a handshake, and the other way round the server drops the
    connection, or answers with a message of TLS.
    """
    if "EOF occurred in violation of protocol" in text:
        return AT_ONCE
    if hint := hint_of_silence(error):
        return hint
    if not url.startswith("redis://"):
        return ""
    dropped = "reset by peer" in text or "closed by server" in text
    if dropped or isinstance(error, exceptions.InvalidResponse):
        return ": if it speaks TLS only, its URL begins with rediss://"
    return ""


def _passing(error: Exception, text: str, url: str) -> tuple[str, str]:
    """What an error is about that may pass, and its sentence."""
    match error:
        case MasterNotFoundError():
            return "sentinel", text
        case SlotError():
            return "slot", text
        case exceptions.InvalidResponse():
            return "connection", (
                f"what answers at {url} does not speak the protocol of Redis ({text[:MAX_SHOWN_CHARS]!a}): check the "
                f"port{_hint_of_tls(error, text, url)}"
            )
        case exceptions.AskError() | exceptions.TryAgainError():
            return (
                "slot",
                f"the cluster at {url} is moving a slot to another node ({text}): it is tried again",
            )
        case _ if isinstance(error, exceptions.OutOfMemoryError) or "because of: OOM" in text:
            return "maxmemory", f"Redis at {url} is full: raise its maxmemory, nothing is lost meanwhile"
        case exceptions.ReadOnlyError() if url.startswith("sentinel://"):
            return (
                "failover",
                f"the master at {url} has just become a replica: Sentinel is asked for the new one",
            )
        case exceptions.ReadOnlyError():
            return "replica", f"Redis at {url} is a read-only replica: use the URL of the master"
        case exceptions.MasterDownError():
            return (
                "master",
                f"Redis at {url} is a replica that has lost its master: use the URL of the master",
            )
        case exceptions.BusyLoadingError():
            return "loading", f"Redis at {url} is still loading its data"
        case exceptions.ConnectionError() if "max number of clients" in text:
            return "maxclients", f"Redis at {url} takes no more connections: raise its maxclients"
        case exceptions.ConnectionError() | exceptions.TimeoutError() | redis.WatchError() | OSError():
            return "connection", f"Redis at {url} cannot be reached ({text}){_hint_of_tls(error, text, url)}"
    if "MISCONF" in text:
        return "disk", f"Redis at {url} cannot write to its disk and so takes no writes: see its log"
    if text.startswith("NOREPLICAS"):
        return "min-replicas-to-write", (
            f"Redis at {url} takes no writes, because too few replicas follow it: start replicas, or lower its "
            "min-replicas-to-write"
        )
    return "command", f"Redis at {url} refused a command ({text[:MAX_SHOWN_CHARS]})"
