"""Loads and unloads adapters in a running server, by the HTTP endpoints that vLLM and SGLang document.

            vLLM                           SGLang
    load    POST /v1/load_lora_adapter     POST /load_lora_adapter     {"lora_name": …, "lora_path": …}
    unload  POST /v1/unload_lora_adapter   POST /unload_lora_adapter   {"lora_name": …}
    list    GET /v1/models                 GET /v1/models

vLLM has the first two only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. It answers with text, and 400 or 404 with a
JSON error if it refuses; SGLang answers {"success", "error_message", "loaded_adapters"}, and 400 if it refuses.

Sources: docs.vllm.ai/en/stable/features/lora, docs.sglang.io/docs/advanced_features/lora.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedmoe.errors import AdapterRefusedError, ServerAwayError, SettingsError
from fedmoe.util.text import printable

TIMEOUT_S = 120.0  # to load an adapter; SGLang waits with unloading until the requests that use it have ended
LOOK_S = 10.0
MAX_REPLY = 2**20  # bytes
_ENDPOINTS = {"vllm": "/v1", "sglang": ""}
_HOW_TO_START = {
    "vllm": "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
    "sglang": "start SGLang with --enable-lora, --max-lora-rank and --lora-target-modules",
}


class AdapterServer:
    """A running vLLM or SGLang.

    Args:
        kind: "vllm" or "sglang".
        url: http:// or https://, with host and port; a /v1 at its end is left out.
        api_key: sent as a bearer token, "" for none.

    Raises:
        SettingsError: if the URL cannot work.
    """

    def __init__(self, kind: str, url: str, *, api_key: str = "") -> None:
        _check_address(kind, url)
        if not (api_key.isascii() and api_key.isprintable()):
            raise SettingsError(
                "--api-key must have printable ASCII characters only: it is sent in a header", about="api_key"
            )
        parts = urlsplit(url)
        self.kind = kind
        self.shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def loaded(self) -> set[str]:
        """The names of the models and adapters that it serves.

        Raises:
            ServerAwayError: if it does not say.
        """
        try:
            models = json.loads(self._ask("/v1/models", timeout_s=LOOK_S))["data"]
            return {str(model["id"]) for model in models}
        except AdapterRefusedError as error:
            raise ServerAwayError(str(error), about="models") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ServerAwayError(
                f"the server at {self.shown} lists no models: is it {self.kind}?", about="models"
            ) from error

    def load(self, name: str, path: Path) -> None:
        """Load the adapter in a directory, which the server sees under the same path.

        Raises:
            AdapterRefusedError: if the server does not take it.
            ServerAwayError: if the server cannot be reached.
        """
        self._ask(f"{_ENDPOINTS[self.kind]}/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> None:
        """Unload an adapter; raises as `load`."""
        self._ask(f"{_ENDPOINTS[self.kind]}/unload_lora_adapter", {"lora_name": name})

    def _ask(
        self, path: str, content: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> bytes:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=self._headers)  # noqa: S310  # checked
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310  # as above
                read: bytes = reply.read(MAX_REPLY)
                return read
        except urllib.error.HTTPError as error:
            with error:
                self._raise_refusal(path, error.code, _message(error))
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no host's name
            what = "answers no HTTP" if isinstance(error, http.client.HTTPException) else "cannot be reached"
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise ServerAwayError(
                f"the server at {self.shown} {what} ({printable(reason)})", about=self.kind
            ) from error
        raise AssertionError("unreachable")

    def _raise_refusal(self, path: str, code: int, message: str) -> None:
        if code == 404 and message.lower() in ("", "not found"):
            raise AdapterRefusedError(
                f"the server at {self.shown} has no {path}: {_HOW_TO_START[self.kind]}", about="endpoint"
            )
        if code in (401, 403):
            raise AdapterRefusedError(
                f"the server at {self.shown} refuses the key ({code}): set the right one (--api-key)",
                about="api_key",
            )
        said = f"the server at {self.shown} answers {code} to {path}: {message}"
        raise (ServerAwayError if code >= 500 else AdapterRefusedError)(said, about="refused")


def _check_address(kind: str, url: str) -> None:
    """Raise SettingsError unless this is an address that can be asked; a password in it is not shown."""
    try:
        parts = urlsplit(url)
        host, user, _ = parts.hostname, parts.username, parts.port  # the port is checked when it is read
        can_be = parts.scheme in ("http", "https") and host and not any(map(str.isspace, url))
    except ValueError:
        can_be, user = False, None
    if not can_be:
        shown = "" if "@" in url else f", not {url!r}"
        raise SettingsError(
            f"--{kind} must be the server's address, like http://127.0.0.1:8000{shown}", about=kind
        )
    if user is not None:
        raise SettingsError(
            f"--{kind} holds a user or a password, which is not sent: leave it out, and give a key with --api-key",
            about=kind,
        )


def _message(error: urllib.error.HTTPError) -> str:
    """What the body of an error reply says, in one line."""
    text = ""
    with suppress(OSError, http.client.HTTPException):  # an error page that breaks off
        text = error.read(MAX_REPLY).decode(errors="replace")
    with suppress(ValueError, AttributeError, RecursionError):
        content = json.loads(text)
        inner = content.get("error")
        content = inner if isinstance(inner, dict) else content
        found = [content.get(name) for name in ("message", "error_message", "detail")]
        text = next((one for one in found if isinstance(one, str)), text)
    return printable(" ".join(text.split()))[:300]
