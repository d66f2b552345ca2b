"""Enrolment files: all that a party needs to reach Redis. Free of torch and redis.

    role = "worker"
    url = "rediss://redis.example.org:6379/0"
    prefix = "fedmoe"
    user = "fedmoe:worker:sql_expert:sql-1"
    password = "…"      # or password_file, password_env, password_command, credential_provider
    expert = "sql_expert"
    name = "sql-1"
    ca = '''-----BEGIN CERTIFICATE-----…'''
    certificate_file, key_file = …, …    # only if the server asks for a client certificate

The file must be readable by its owner alone. It is read again for each connection, so a new password needs no restart.
"""

import importlib
import os
import stat
import subprocess
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedmoe.errors import FedMoEError, RedisUnfitError, SettingsError
from fedmoe.protocol.keys import DEFAULT_PREFIX, Keys
from fedmoe.protocol.parties import Party

SECRETS = ("password", "password_file", "password_env", "password_command", "credential_provider")
COMMAND_TIMEOUT_S = 10.0
MAX_BYTES = 1 << 20
Login = tuple[str, str]  # user and password


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """The content of an enrolment file.

    Args:
        url: of Redis, without login.
        user: of Redis; "" for a credential_provider that names it.
        password, password_file, password_env, password_command, credential_provider: one of them says where the
            password comes from: this text, the first line of a file, an environment variable, the first line of a
            command's output, or a Python callable `module:name` that returns user and password.
        ca: certificates (PEM) of the authorities that may sign the server's certificate; "" for the system's.
        certificate_file, key_file: of the client's own certificate, relative to the enrolment file.
        role, expert, name: whom it enrols.
        path: of the file.
    """

    url: str
    prefix: str = DEFAULT_PREFIX
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    password_env: str = ""
    password_command: tuple[str, ...] = ()
    credential_provider: str = ""
    role: str = ""
    expert: str = ""
    name: str = ""
    ca: str = field(default="", repr=False)
    certificate_file: str = ""
    key_file: str = ""
    path: Path = field(default=Path(), compare=False)

    @classmethod
    def read(cls, path: Path) -> "Enrolment":
        """Read a file.

        Raises:
            SettingsError: if it cannot be read, others can read it, or a key in it is wrong; without any secret.
        """
        text = _read_private(path)
        try:
            content = tomllib.loads(text)
        except (ValueError, RecursionError):  # its message may quote the password
            raise _wrong(path, "is not TOML: ask the operator for a new one", about="enrolment") from None
        known = {one.name: one for one in fields(cls) if one.name != "path"}
        if odd := sorted(content.keys() - known.keys()):
            raise _wrong(path, f"has the unknown key {odd[0]!r}: there are {', '.join(known)}", about=odd[0])
        for key, value in content.items():
            is_right = isinstance(value, str) or (key == "password_command" and _is_command(value))
            if not is_right:
                what = "a list of texts" if key == "password_command" else "a text in quotes"
                raise _wrong(path, f"has a {key} that is not {what}", about=key)
        if isinstance(command := content.get("password_command", []), str):
            raise _wrong(path, "has a password_command that is not a list of texts", about="password_command")
        found = (
            cls(**content | {"password_command": tuple(command), "path": path}) if "url" in content else None
        )
        if found is None:
            raise _wrong(path, "names no url", about="url")
        found._check()
        return found

    def _check(self) -> None:
        said = [name for name in SECRETS if getattr(self, name)]
        if len(said) != 1:
            raise _wrong(
                self.path, f"must have exactly one of {', '.join(SECRETS)}; it has {' and '.join(said) or 'none'}",
                about="password",
            )  # fmt: skip
        if not self.user and not self.credential_provider:
            raise _wrong(self.path, "names no user", about="user")
        if "@" in self.url:
            raise _wrong(
                self.path, "has a login in its url: user and password are keys of their own", about="url"
            )
        if bool(self.certificate_file) != bool(self.key_file):
            raise _wrong(self.path, "needs certificate_file and key_file together", about="key_file")
        Keys(self.prefix)
        if self.role:
            Party(role=self.role, expert=self.expert, name=self.name)

    def login(self) -> Login:
        """User and password of now; files, variables and commands are read each time.

        Raises:
            RedisUnfitError: if there is none; a later connection tries again.
        """
        try:
            now = Enrolment.read(self.path)
            password = now._password()
            if isinstance(password, tuple):
                return password
        except SettingsError as error:
            raise RedisUnfitError(str(error), about=error.about) from error
        return now.user, password

    def _password(self) -> str | Login:
        if self.password_env:
            if not (found := os.environ.get(self.password_env)):
                raise _wrong(
                    self.path, f"takes the password from the variable {self.password_env!r}, which is not set",
                    about="password_env",
                )  # fmt: skip
            return found
        if self.password_file:
            return _first_line(_read_private(self.path.parent / self.password_file), self, "password_file")
        if self.password_command:
            return _first_line(_run(self.password_command, self.path), self, "password_command")
        if self.credential_provider:
            return _ask(self.credential_provider, self.path)
        return self.password

    def beside(self, name: str) -> Path:
        """The path of a file that the enrolment names."""
        return self.path.parent / Path(name).expanduser()


def _is_command(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _wrong(path: Path, why: str, *, about: str) -> SettingsError:
    return SettingsError(f"the enrolment file {str(path)!r} {why}", about=about)


def _first_line(text: str, enrolment: Enrolment, source: str) -> str:
    if not (line := text.partition("\n")[0].strip()):
        raise _wrong(enrolment.path, f"gets an empty password from its {source}", about=source)
    return line


def _read_private(path: Path) -> str:
    """The text of a file that only its owner can read; or, as Kubernetes mounts secrets, root's and our group's."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            mode = stat.S_IMODE(state.st_mode)
            is_mounted = state.st_uid == 0 != os.geteuid() and not mode & 0o037
            if mode & 0o077 and not is_mounted:
                raise SettingsError(
                    f"the file {str(path)!r} holds a secret and others can read it (mode {mode:03o}): run "
                    f"chmod 600 on it, and if others use this machine, ask the operator for a new password",
                    about="enrolment",
                )
            return file.read(MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"cannot read {str(path)!r}: {error.strerror}", about="enrolment") from error
    except UnicodeDecodeError:
        raise SettingsError(f"cannot read {str(path)!r}: it is not a text", about="enrolment") from None


def _run(command: tuple[str, ...], path: Path) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_TIMEOUT_S, check=True
        )
        return done.stdout.decode()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        match error:
            case subprocess.TimeoutExpired():
                why = f"did not end within {COMMAND_TIMEOUT_S:.0f} s"
            case subprocess.CalledProcessError():
                why = f"ended with exit code {error.returncode}"
            case OSError():
                why = f"cannot be run: {error.strerror}"
            case _:
                why = "prints no text"
    raise _wrong(path, f"has a password_command, {command[0]!r}, that {why}", about="password_command")


def _ask(provider: str, path: Path) -> Login:
    """User and password from the callable `module:name`."""
    module, _, name = provider.partition(":")
    try:
        return as_login(getattr(importlib.import_module(module), name)())
    except FedMoEError:
        raise
    except Exception as error:  # another's code
        raise _wrong(
            path, f"names a credential_provider, {provider!r}, that fails ({type(error).__name__}): write MODULE:NAME "
            "of a callable that returns user and password", about="credential_provider",
        ) from error  # fmt: skip


def as_login(found: Any) -> Login:
    """Check what a credential provider returned.

    Raises:
        SettingsError: unless it is a pair of texts.
    """
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, str) for part in found):
        return found
    raise SettingsError(
        "the credential provider must return (user, password), both texts", about="credential_provider"
    )
