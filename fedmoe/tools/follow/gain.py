"""Whether a new version is better than the one that is served: by its loss on held-out rows, where one is known."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import BaseModelError, UnknownExpertError
from fedmoe.model.adapter import adapter_loaded
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.names import GATEWAY
from fedmoe.settings import HeldOutSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.base import Base, load_for_some
from fedmoe.tools.evaluate import Adapter, mean_loss
from fedmoe.tools.rows import Encoder, find_files


@dataclass
class HeldOutLoss:
    """The mean loss of an adapter over the domains of held-out rows; base model and rows are read once.

    Args:
        store: of the federation, whose experts say how rows become tokens.
        settings: the rows, and how to compute.
        report: gets a line for all that is read.
    """

    store: GatewayStore
    settings: HeldOutSettings
    report: Callable[[str], None]
    _ready: "_Ready | None" = field(default=None, init=False)

    def __call__(self, adapter: Adapter | None) -> float:
        """Nats per token of the answers; None is the bare base model.

        Raises:
            FedMoEError: if rows, base model and adapter do not fit together.
        """
        base, domains = self._read()
        loaded = (
            adapter_loaded(base.model, adapter.file, adapter.config) if adapter else nullcontext(base.model)
        )
        with loaded as model:
            losses = [
                mean_loss(
                    model, examples, pad_id=base.pad_id, batch_size=self.settings.batch_size, device=base.device,
                    autocast=base.autocast,
                )
                for examples in domains
            ]  # fmt: skip
        return sum(losses) / len(losses)

    def check(self, *, load: bool) -> None:
        """Find out whether the rows can be used, before anything is measured.

        Args:
            load: True to load the base model and encode the rows, too.

        Raises:
            SettingsError, DataError: if they cannot be used.
            RedisUnavailableError, UnknownExpertError: if Redis does not yet say which experts there are; the files that
                are named have been looked at.
            BaseModelError: if the base model cannot be loaded, or is not the experts'.
        """
        self._open([text for text in self.settings.data if not Path(text).is_dir()], ())
        if load:
            self._read()
        else:
            self._open(self.settings.data, self._experts())

    def _read(self) -> "_Ready":
        self._ready = self._ready or self._prepare()
        return self._ready

    def _experts(self) -> dict[str, float]:
        """Expert -> its gateway weight."""
        weights = {name: weight for name, weight in self.store.experts().items() if name != GATEWAY}
        if not weights:
            raise UnknownExpertError(
                "there are no experts yet: start `fedmoe aggregator run`", about="experts"
            )
        return weights

    def _open(self, texts: Sequence[str], experts: Collection[str]) -> tuple[dict[str, DataFile], BadRows]:
        bad_rows = BadRows(report=self.report, file=self.settings.bad_rows)
        return {
            name: open_data(file, bad_rows) for name, file in find_files(texts, list(experts)).items()
        }, bad_rows

    def _prepare(self) -> "_Ready":
        weights = self._experts()
        data, bad_rows = self._open(self.settings.data, weights)
        if without := sorted(data.keys() - weights):
            self.report(
                f"no expert of its own: {', '.join(without)} (the experts are {', '.join(sorted(weights))}); these "
                "rows count as another domain"
            )
        specs = {name: self.store.spec(name) for name in weights}
        metas = {name: self.store.meta(name) for name in weights}
        templates = {name: expert_template(specs[name], metas[name]) for name in weights}
        merged = [name for name, weight in weights.items() if weight] or weights
        base, others = load_for_some(self.settings, specs, metas, templates, self.report, needed=merged)
        named = {text.partition("=")[0] for text in self.settings.data}
        for name in others:
            if name in named or not data.keys() - set(others):
                raise BaseModelError(
                    f"--data has rows of {name}, an adapter of another base model than {base.name}: give rows of the "
                    "others",
                    about="base_model",
                )
            self.report(f"{name} is left out: it is an adapter of another base model than {base.name}")
            for of in (data, metas, templates):
                of.pop(name, None)
        encoder = Encoder(
            tokenizer=base.tokenizer,
            config=base.config,
            templates=templates,
            max_length=max(meta.rules.training.max_length for meta in metas.values()),
            learn=self.settings.learn,
            bad_rows=bad_rows,
            report=self.report,
        )
        return _Ready(
            base, [encoder.examples(name, rows, sample=self.settings.rows) for name, rows in data.items()]
        )


class _Ready(NamedTuple):
    base: Base
    domains: list[FlatExamples]
