"""One base model in memory, with the adapters of the gateway and of all experts; answers one question at a time."""

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from fedmoe.data.template import ChatTemplate
from fedmoe.data.turns import Turn
from fedmoe.errors import (
    BaseModelError,
    FedMoEError,
    LostExpertError,
    RedisUnavailableError,
    RequestError,
    RowError,
    SpecError,
    UnknownExpertError,
    UnknownModelError,
)
from fedmoe.model.adapter import attach_adapter, switch_to
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.layout import layout_of, values_of
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Meta
from fedmoe.settings import AnswerSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.base import check_base_of
from fedmoe.tools.export import Export, read_expert, read_gateway, trained_gateway
from fedmoe.tools.rows import with_template
from fedmoe.tools.serve.common import load_common
from fedmoe.tools.serve.requests import ChatRequest, StopCutter, refused_by_template

logger = logging.getLogger(__name__)

BASE = "base"
# Below this temperature the likeliest token is taken, as in vLLM: fp32 logits divided by less would overflow.
LIKELIEST = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that answers.

    Args:
        name: of the gateway, an expert, or the base model.
        version: its name and version, for example `sql_expert-v12-3fa9c1e0`.
        mark: the commits that it was made of.
        key: of its adapter in peft, "" for the base model.
        template: its chat template, "" for the base model's own.
        kind: as an `Export` has it, "" for the base model.
    """

    name: str
    version: str
    mark: str
    key: str
    template: str
    kind: str = ""


class Finish(NamedTuple):
    """How an answer ended: `stop` or `length`; tokens of question and answer."""

    reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI's API has it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
        }  # fmt: skip


class Engine:
    """Loads the base model of a federation; `refresh` loads what is new in Redis.

    Args:
        store: of the federation.
        settings: see there.
        report: gets a line for what is loaded first.
        wanted: name of a model that must be there; it is looked for before the base model is loaded. "" for any.

    Raises:
        UnknownExpertError: if there is no expert yet.
        UnknownModelError: if the wanted model is not there.
        BaseModelError: if gateway, wanted expert or all experts are of another base model; other experts are left out.
    """

    def __init__(
        self,
        store: GatewayStore,
        settings: AnswerSettings,
        report: Callable[[str], None],
        *,
        wanted: str = "",
    ) -> None:
        self._store, self._settings = store, settings
        # Models that cannot be served, each with its mark or with what is wrong.
        self._odd: set[tuple[str, str]] = set()
        self._served = {BASE: Served(name=BASE, version=BASE, mark="", key="", template="")}
        metas = store.metas()
        if not metas:
            raise UnknownExpertError(
                "there are no experts yet: start `fedmoe aggregator run`", about="experts"
            )
        if wanted == GATEWAY:
            trained_gateway(store)  # it says so if Redis has lost it
        if wanted and wanted not in (there := {BASE, *self._marks(metas)}):
            raise _unknown(wanted, there)
        self._base = load_common(store, settings, metas, report, wanted=wanted)
        self._model: PeftModel | None = None
        self._count = 0
        self._lock = threading.Lock()  # the model computes for one at a time
        if BASE in metas:
            report(f"the expert {BASE} cannot be asked, because the base model has this name")

    def models(self) -> list[Served]:
        """What can be asked now: the gateway first, the base model last."""
        return [self._served[name] for name in _ordered(self._served)]

    def model(self, name: str) -> Served:
        """The model of that name.

        Raises:
            UnknownModelError: lists those that there are.
        """
        if (found := self._served.get(name)) is None:
            raise _unknown(name, self._served)
        return found

    def refresh(self) -> None:
        """Load every adapter that changed in Redis, and drop those that an operator removed.

        What cannot be read stays, and so does what Redis has lost for now: aggregators write it back.

        Raises:
            RedisUnavailableError: if Redis does not answer; all stays as it is.
        """
        metas = self._store.metas()
        marks = self._marks(metas)
        for name, mark in marks.items():
            known = self._served.get(name)
            if (known and known.mark == mark) or (name, mark) in self._odd:
                continue
            try:
                if name == GATEWAY:
                    export = read_gateway(self._store)
                else:
                    spec = self._store.spec(name)
                    check_base_of(self._base, name, spec, metas[name], expert_template(spec, metas[name]))
                    export = read_expert(self._store, name)
                self._take(name, mark, export)
            except RedisUnavailableError:
                raise
            except (
                UnknownExpertError
            ) as error:  # it is lost or damaged now, and may be written back as it was
                self._warn_once(name, f"this version is left out: {error}")
            except BaseModelError as error:
                self._odd.add((name, mark))
                self._warn_once(
                    name,
                    "it is left out, because it cannot be served beside the others: it was trained on another base "
                    f"model or tokenizer than {self._base.name}, which is loaded (they differ in {error.about}); serve "
                    "it elsewhere from an export",
                )
            except FedMoEError as error:
                self._odd.add((name, mark))
                logger.warning("%s: this version is left out: %s", name, error)
        for name in self._removed(self._served.keys() - marks.keys() - {BASE}):
            self._drop(self._served.pop(name))

    def _removed(self, missing: Set[str]) -> Set[str]:
        """Those of the models without a mark that an operator removed, or took off the list; reports others once.

        The gateway is none of them: it answers until there is another one.
        """
        if not missing:
            return set()
        listed = self._store.listed()
        there, removed = self._store.compare(missing)
        # Without any list Redis has lost it: on a cluster it may lie on another master than the experts.
        gone = missing & (removed | (there - listed if listed else set()))
        # If the trained one was removed, the merged one takes its place, which Redis may have lost.
        gone -= {GATEWAY}
        for name in missing - gone:
            self._warn_once(
                name, f"it cannot be read in Redis now, and {self._served[name].version} answers on"
            )
        return gone

    def _warn_once(self, name: str, problem: str) -> None:
        if (name, problem) not in self._odd:
            self._odd.add((name, problem))
            logger.warning("%s: %s", name, problem)

    def _marks(self, metas: Mapping[str, Meta]) -> dict[str, str]:
        """Model -> the commits that its present version is made of; no gateway if Redis has lost the trained one."""
        marks = {name: meta.weights_commit for name, meta in metas.items() if name not in (GATEWAY, BASE)}
        served = self._served.get(GATEWAY)
        try:
            trained = trained_gateway(self._store, seen=served is not None and served.kind == "trained")
            if trained is not None:
                return marks | {GATEWAY: trained.weights_commit}
            merged = self._store.merged()
        except (LostExpertError, SpecError) as error:
            if served is None or isinstance(error, SpecError):  # else `_removed` says what answers on
                self._warn_once(GATEWAY, str(error))
            return marks
        if merged is not None:
            commits = sorted((name, one.weights_commit) for name, one in merged.experts.items())
            marks[GATEWAY] = f"{merged.settings} {commits}"
        return marks

    def _take(self, name: str, mark: str, export: Export) -> None:
        self._check_base(export)
        layout = layout_of(export.file)
        first = next(iter(export.specs.values()))
        lora = replace(first.lora, rank=int(export.config["r"]), alpha=float(export.config["lora_alpha"]))
        key = f"adapter{self._count}"  # peft takes no dot in a name
        self._count += 1
        fresh = Served(
            name=name,
            version=export.version_name(),
            mark=mark,
            key=key,
            template=export.chat_template,
            kind=export.kind,
        )
        with self._lock:
            target = self._model or self._base.model
            self._model, flat = attach_adapter(target, replace(first, layout=layout, lora=lora), key)
            flat.copy_(values_of(layout, export.file))
            self._model.requires_grad_(False).eval()
            before = self._served.get(name)
            self._served[name] = fresh
        if before:
            self._drop(before)
        logger.info("%s: answers from now on", fresh.version)

    def _drop(self, one: Served) -> None:
        with self._lock:
            if self._model is not None and one.key:
                with (
                    warnings.catch_warnings()
                ):  # peft says which adapter it takes instead; each answer says its own
                    warnings.simplefilter("ignore", UserWarning)
                    self._model.delete_adapter(one.key)

    def _check_base(self, export: Export) -> None:
        prints = {meta.base_fingerprint for meta in export.metas.values()} - {"", self._base.fingerprint}
        if prints or not export.specs:
            raise BaseModelError("it is an adapter of another base model", about="base_model")

    def answer(
        self,
        request: ChatRequest,
        *,
        on_start: Callable[[str], None],
        on_text: Callable[[str], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Finish:
        """Answer a request; waits until the model is free.

        Args:
            request: the conversation.
            on_start: gets the version that answers, when it begins.
            on_text: gets the answer, piece by piece.
            cancelled: ends the answer when it returns True; asked at every token.

        Raises:
            UnknownModelError: if there is no such model.
            RequestError: if the conversation cannot be rendered, or is too long.
        """
        with self._lock:
            served = self.model(request.model)
            tokenizer = with_template(self._base.tokenizer, served.template)
            prompt = self._encode(tokenizer, served, request)
            ends_at = self._base.end_ids(tokenizer)
            length = prompt["input_ids"].shape[1]
            room = self._room(length)
            limit = min(request.max_tokens or self._settings.max_tokens, room)
            on_start(served.version)
            cutter = StopCutter(request.stop)

            def pass_on(text: str, is_last: bool) -> None:
                if piece := cutter.cut(text, is_last=is_last):
                    on_text(piece)

            ends = StoppingCriteriaList([_Ends(lambda: cutter.is_done or cancelled())])
            with (
                torch.random.fork_rng(enabled=request.seed is not None),
                self._computing_with(served),
                torch.no_grad(),
            ):
                if request.seed is not None:
                    torch.manual_seed(request.seed)
                with torch.autocast(
                    self._base.device.type, self._base.autocast, enabled=self._base.autocast != torch.float32
                ):
                    tokens = self._base.model.generate(
                        **prompt, **_sampling(request), max_new_tokens=limit, pad_token_id=self._base.pad_id,
                        eos_token_id=ends_at or None, stopping_criteria=ends,
                        streamer=_Streamer(self._base.tokenizer, pass_on),
                    )  # fmt: skip
            made = int(tokens.shape[1]) - length
            is_cut = made >= limit and not cutter.is_done and int(tokens[0, -1]) not in ends_at
            return Finish("length" if is_cut else "stop", length, made)

    def _computing_with(self, served: Served) -> Any:
        """A context in which the model computes with this adapter, or with none."""
        if self._model is None:
            return nullcontext()
        if not served.key:
            return self._model.disable_adapter()
        switch_to(self._model, served.key)()
        return nullcontext()

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, served: Served, request: ChatRequest
    ) -> dict[str, torch.Tensor]:
        if not tokenizer.chat_template:
            raise RequestError(f"{served.name} has no chat template, so it takes no messages", about="model")
        turns = [Turn(role=message["role"], content=message["content"]) for message in request.messages]
        try:
            "".join(turn.content for turn in turns).encode()
            prompt = ChatTemplate(tokenizer).prompt(turns)  # as the adapters were trained
        except UnicodeEncodeError as error:  # a line of a terminal or a pipe with other bytes
            raise RequestError("a message is not text in UTF-8: write it again", about="messages") from error
        except RowError as error:
            raise refused_by_template(error) from error
        encoded: Any = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", verbose=False)
        return {name: encoded[name].to(self._base.device) for name in ("input_ids", "attention_mask")}

    def _room(self, length: int) -> int:
        most = int(getattr(self._base.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        if length >= most:
            raise RequestError(
                f"the messages have {length} tokens, the model takes {most}: shorten them", about="messages"
            )
        return most - length


def _ordered(names: Iterable[str]) -> list[str]:
    """The gateway first, the base model last."""
    order = {GATEWAY: 0, BASE: 2}
    return sorted(names, key=lambda name: (order.get(name, 1), name))


def _unknown(name: str, there: Iterable[str]) -> UnknownModelError:
    return UnknownModelError(
        f"there is no model {name!r}; there are: {', '.join(_ordered(there))}", about="model"
    )


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """The arguments of `generate`; those that a request leaves out are the base model's own."""
    if request.temperature is not None and request.temperature < LIKELIEST:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    found = {name: getattr(request, name) for name in ("temperature", "top_p")}
    given = {name: value for name, value in found.items() if value is not None}
    return given | ({"do_sample": True} if given else {})


class _Ends(StoppingCriteria):  # type: ignore[misc]  # mypy does not read transformers
    """Ends a generation when a condition is true."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **more: Any
    ) -> torch.BoolTensor:
        """One value a row."""
        return torch.full((input_ids.shape[0],), self._is_over(), device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]  # is one


class _Streamer(TextStreamer):  # type: ignore[misc]  # as above
    """Passes the text on as soon as its tokens make whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pass_on: Callable[[str, bool], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pass_on = pass_on

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self._pass_on(text, stream_end)
