"""Login and TLS of a connection: from an enrolment file or a credential provider, asked at each connection."""

import ssl
import threading
from collections.abc import Callable
from typing import Any

import redis

from fedmoe.enrolment import Enrolment, Login, as_login
from fedmoe.errors import FedMoEError, RedisUnfitError, SettingsError
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.url import is_tls


class Credentials(redis.CredentialProvider):
    """redis-py asks it for user and password whenever it connects."""

    def __init__(self, ask: Callable[[], Login]) -> None:
        self._ask = ask
        self._lock = threading.Lock()

    def get_credentials(self) -> Login:
        """User and password of now.

        Raises:
            RedisUnfitError: if there is none.
        """
        with self._lock:
            try:
                return as_login(self._ask())
            except RedisUnfitError:
                raise
            except FedMoEError as error:
                raise RedisUnfitError(str(error), about=error.about) from error
            except Exception as error:  # the caller's own code
                raise RedisUnfitError(
                    f"the credential provider fails ({type(error).__name__}: {error}): it must return user and "
                    "password",
                    about="credential_provider",
                ) from error


def login_and_tls(settings: RedisSettings) -> dict[str, Any]:
    """redis-py's connection arguments for login and TLS, as far as the URL does not hold them.

    Raises:
        SettingsError: if a certificate needs TLS and the URL has none.
    """
    found: dict[str, Any] = {}
    ask = settings.credential_provider or (settings.enrolled.login if settings.enrolled else None)
    if ask is not None:
        found["credential_provider"] = Credentials(ask)
    if settings.enrolled is not None:
        found |= _tls(settings.enrolled)
    return found


def _check_ca(enrolled: Enrolment) -> None:
    try:
        ssl.create_default_context(cadata=enrolled.ca)
    except (ssl.SSLError, TypeError) as error:  # TypeError: letters outside ASCII
        raise SettingsError(
            f"the enrolment file {str(enrolled.path)!r} has a damaged ca: ask the operator for a new one",
            about="ca",
        ) from error


def _readable(enrolled: Enrolment, name: str) -> str:
    path = enrolled.beside(name)
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(
            f"cannot read {str(path)!r}, which the enrolment file names: {error.strerror}", about="key_file"
        ) from error
    return str(path)


def _tls(enrolled: Enrolment) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if enrolled.ca:
        found["ssl_ca_data"] = enrolled.ca
    if enrolled.key_file:
        found["ssl_keyfile"] = _readable(enrolled, enrolled.key_file)
        found["ssl_certfile"] = _readable(enrolled, enrolled.certificate_file)
    if found and not is_tls(enrolled.url):
        raise SettingsError(
            f"the enrolment file {str(enrolled.path)!r} has a certificate, but its url has no TLS: it must begin "
            "with rediss://",
            about="url",
        )
    if enrolled.ca:
        _check_ca(enrolled)
    return found
