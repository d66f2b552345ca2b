"""A chat with the gateway or an expert, line by line."""

from collections.abc import Callable, Iterable

from fedmoe.errors import RedisUnavailableError, RequestError
from fedmoe.tools.serve.engine import BASE, Engine
from fedmoe.tools.serve.requests import ChatRequest

HELP = "/model NAME asks another model, /models lists them, /new begins a new conversation, /quit ends"


class Chat:
    """One conversation at a time; an answer is preceded by the version that gives it.

    Args:
        engine: that answers.
        model: name of the model to ask first; "" for the gateway, or without one the first model there is.
        write: gets what is printed, piece by piece.
        temperature: of the sampling, None for the base model's own.
    """

    def __init__(
        self, engine: Engine, model: str, write: Callable[[str], None], *, temperature: float | None = None
    ) -> None:
        self._engine, self._write, self._temperature = engine, write, temperature
        self._model = engine.model(model or engine.models()[0].name).name
        self._messages: list[dict[str, str]] = []

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line; ends with the lines, or at /quit."""
        for line in lines:
            words = line.split()
            if not words:
                continue
            if words[0] == "/quit":
                return
            if words[0].startswith("/"):
                self._command(words)
            else:
                self._answer(line.strip())

    def _command(self, words: list[str]) -> None:
        if words[0] == "/new" and len(words) == 1:
            self._messages.clear()
            self._write("a new conversation\n")
        elif words[0] == "/models" and len(words) == 1:
            self._write(", ".join(one.version for one in self._engine.models()) + "\n")
        elif words[0] == "/model" and len(words) == 2:
            try:
                self._model = self._engine.model(words[1]).name
            except RequestError as error:
                self._write(f"{error}\n")
        else:
            self._write(f"{HELP}\n")

    def _answer(self, question: str) -> None:
        try:
            self._engine.refresh()
        except RedisUnavailableError as error:
            self._write(f"({error}; the versions that were read before answer)\n")
        said: list[str] = []

        def on_text(text: str) -> None:
            said.append(text)
            self._write(text)

        request = ChatRequest(
            model=self._model,
            messages=(*self._messages, {"role": "user", "content": question}),
            temperature=self._temperature,
        )
        try:
            self._engine.answer(
                request, on_start=lambda version: self._write(f"[{version}] "), on_text=on_text
            )
        except KeyboardInterrupt:
            self._write(" (interrupted)")
        except RequestError as error:
            after = (
                ", or begin a new conversation with /new"
                if error.about == "messages" and self._messages
                else ""
            )
            self._write(f"{error}{after}\n")
            if self._model not in {one.name for one in self._engine.models()}:
                self._model = BASE
            return
        self._write("\n")
        self._messages += [
            {"role": "user", "content": question}, {"role": "assistant", "content": "".join(said)},
        ]  # fmt: skip
