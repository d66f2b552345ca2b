"""A stand-in for vLLM and SGLang: the endpoints for adapters that they document, and what they answer."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class StandIn:
    """A server of the base model `base`; `calls` are the requests that change something, in their order.

    Args:
        kind: "vllm" or "sglang".
        max_rank: adapters of a higher rank are refused.
        updating: False: a vLLM without VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        key: the bearer token that it wants, "" for none.
    """

    def __init__(
        self, kind: str = "vllm", *, max_rank: int = 64, updating: bool = True, key: str = ""
    ) -> None:
        self.kind, self.max_rank, self.updating, self.key = kind, max_rank, updating, key
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.ever: dict[str, bytes] = {}  # what was loaded under each name
        self.broken = False
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port of before if there was one; adapters do not survive a restart."""
        stand_in, self.adapters = self, {}

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
                pass

            def do_GET(self) -> None:  # http.server's name
                stand_in.answer(self, "GET", {})

            def do_POST(self) -> None:  # http.server's name
                length = int(self.headers["Content-Length"])
                stand_in.answer(self, "POST", json.loads(self.rfile.read(length)))

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening; whoever asks is refused."""
        if self._http:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def answer(self, request: BaseHTTPRequestHandler, method: str, content: dict[str, Any]) -> None:
        status, body = self._answer(request, method, content)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _answer(
        self, request: BaseHTTPRequestHandler, method: str, content: dict[str, Any]
    ) -> tuple[int, Any]:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if self.broken:
            return 500, "Internal Server Error"
        if (method, request.path) == ("GET", "/v1/models"):
            names = ["base", *self.adapters]
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
        prefix = "/v1" if self.kind == "vllm" else ""
        if method == "POST" and self.updating and request.path == f"{prefix}/load_lora_adapter":
            return self._reply("added", self._load(content["lora_name"], content["lora_path"]), content)
        if method == "POST" and self.updating and request.path == f"{prefix}/unload_lora_adapter":
            name = content["lora_name"]
            problem = "" if name in self.adapters else f"The lora adapter '{name}' cannot be found."
            self.calls.append(("unload", name))
            self.adapters.pop(name, None)
            return self._reply("removed", problem, content)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str) -> str:
        """Load an adapter; "" or what is wrong with it."""
        self.calls.append(("load", name))
        if name in self.adapters:
            return f"The lora adapter '{name}' has already been loaded."
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_text())
            weights = (Path(path) / "adapter_model.safetensors").read_bytes()
        except OSError:
            return f"No adapter found for {path}"
        if config["r"] > self.max_rank:
            return f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
        self.adapters[name] = path
        assert self.ever.setdefault(name, weights) == weights, f"{name} was loaded with other weights before"
        return ""

    def _reply(self, done: str, problem: str, content: dict[str, Any]) -> tuple[int, Any]:
        if self.kind == "sglang":
            reply = {"success": not problem, "error_message": problem, "loaded_adapters": self.adapters}
            return (400 if problem else 200), reply
        if problem:
            return 400, {"error": {"message": problem, "type": "BadRequestError", "param": None, "code": 400}}
        return 200, f"Success: LoRA adapter '{content['lora_name']}' {done} successfully."


@contextmanager
def stand_in(kind: str = "vllm", **more: Any) -> Iterator[StandIn]:
    """A running stand-in."""
    server = StandIn(kind, **more)
    server.start()
    try:
        yield server
    finally:
        server.stop()
