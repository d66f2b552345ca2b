"""What runs are made of, loaded once: the demo's model, the rows of its domains, and their held-out losses."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from consumers.gateway.merge import Merged, MergeInput, merge
from consumers.gateway.search import SCALES, Objective, search, side_by_side
from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Example
from fedmoe.data.examples import make_examples, padding_id
from fedmoe.data.jsonl import open_data
from fedmoe.demo.corpus import DOMAINS as SOURCES
from fedmoe.demo.corpus_rows import Row, Split, split_by_source
from fedmoe.demo.pretrained import ensure_demo_model
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import choose_precision, load_base, load_config
from fedmoe.model.hidden import prompt_states
from fedmoe.model.tokenizer import load_tokenizer
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.vectors import DomainVector, nearest
from fedmoe.tools.arrow import arrow_loaded
from fedmoe.tools.evaluate import BASE, Adapter, mean_loss, mean_of_rows, row_losses
from fedmoe.util.disk import cache_directory
from ops.bench.fedmoe_side import make_spec
from ops.bench.learning.runs import ALL, DOMAINS, GATEWAY, HALVES, Run, WorkerPlan
from ops.bench.learning.stage import Stage, StageTrainer, linears_in
from producers.vector import some_of

CPU = torch.device("cpu")
TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=2, max_length=192, warmup_steps=4)
VECTOR_ROWS = 40  # of a domain, that its vector is the mean of
TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 600, 64, 128  # of a domain, where it has so many
FIT_ROWS = 24  # validation rows of a domain, on which a merge is fitted and rules are chosen
FIT_PASSES = 12  # passes with gradient of a fit
FITTED = "cat fitted"
FIT_GROUPS = 3  # groups of layers with weights of their own, in the second fit
FITTED_GROUPS = f"cat fitted, {FIT_GROUPS} groups of layers"
FIXED = {f"cat {scale:g}": ("cat", scale) for scale in SCALES}  # how the aggregator merges, and the scale
MERGED = (*FIXED, "svd 1.8", FITTED, FITTED_GROUPS)  # the merges of experts that were trained apart
THREADS = 2  # at most; OMP_NUM_THREADS=1 is faster on a machine that is busy

Rows = Mapping[str, Sequence[Example]]  # of each domain


class Material(NamedTuple):
    """Training, validation and test rows of every domain, the padding id, and the model's directory."""

    train: Rows
    valid: Rows
    test: Rows
    pad_id: int
    model_dir: str


class Remembering(Objective):
    """An objective that computes the loss of equal weights once, for however many groups of layers they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._known: dict[tuple[float, ...], float] = {}

    def __call__(self, weights: torch.Tensor) -> float:
        """As Objective."""
        if weights.requires_grad or not torch.equal(weights, weights[:1].expand_as(weights)):
            return super().__call__(weights)
        key = tuple(weights[0].tolist())
        if key not in self._known:
            self._known[key] = super().__call__(weights)
        return self._known[key]


class Lab:
    """One base model at one rank, with the rows of all domains.

    Args:
        rank: of the adapters; alpha is twice the rank.
        material: the demo's by default.
        precision: as in `choose_precision`.
    """

    def __init__(self, rank: int, material: Material | None = None, precision: str = "auto") -> None:
        torch.set_num_threads(min(THREADS, torch.get_num_threads()))
        self.train, self.valid, self.test, self.pad_id, self.model_dir = material or demo_rows()
        lora = LoraSettings(rank=rank, alpha=2.0 * rank)
        self._spec = make_spec(adapter_layout(load_config(self.model_dir), lora), "int4", lora=lora)
        self.stage = Stage(load_base(self.model_dir, device=CPU, dtype=torch.float32), self._spec)
        self._vectors: dict[str, torch.Tensor] = {}
        self._prompts: dict[tuple[str, int], torch.Tensor] = {}  # domain, rows → their states
        self._known: dict[tuple[str, str, int], torch.Tensor] = {}  # adapters, domain, rows → their losses
        self._autocast = choose_precision(precision, CPU)
        self.precision = str(self._autocast).removeprefix("torch.")
        linears_in(self.stage.model, self._autocast)

    def spec(self, run: Run, chain: str = GATEWAY) -> Spec:
        """The spec of a chain of the run."""
        seed = seed_of(f"{run.seed} {chain}") if run.adds_up and is_expert(chain) else run.seed
        fields = {"init_seed": seed, "wire_format": run.wire_format}
        return make_spec(self._spec.layout, lora=self._spec.lora, **fields)

    def trainer(
        self, run: Run, plan: WorkerPlan, chain: str, flat: torch.Tensor, leader: StageTrainer | None = None
    ) -> StageTrainer:
        """A real trainer on the worker's rows; if it takes turns, each of its chains has an order of its own."""
        order = f"{run.seed} {plan.name}" + (f" {chain}" if run.scheme == "turns" else "")
        return StageTrainer(
            stage=self.stage,
            flat=flat,
            examples=share_of(self.train, plan, run.domains),
            pad_id=self.pad_id,
            settings=TRAINING,
            seed=seed_of(order),
            autocast=self._autocast,
            leader=leader,
        )

    def losses(
        self,
        rows: int,
        adapter: torch.Tensor | Merged,
        domains: Iterable[str],
        *,
        frozen: Sequence[torch.Tensor] = (),
    ) -> dict[str, float]:
        """The held-out loss of an adapter on some domains, with others (numel,) active beside it.

        What was computed before is not computed again.
        """
        key = None if isinstance(adapter, Merged) else self._key(adapter, *frozen)
        found = {}
        for domain in domains:
            examples, known = self.test[domain][:rows], key and (key, domain, rows)
            losses = self._known.get(known) if known else None
            if losses is None:
                if isinstance(adapter, Merged):
                    self.stage.show_merged(adapter)
                else:
                    self.stage.show(adapter, frozen=frozen)
                losses = self._row_losses(examples)
            if known:
                self._known[known] = losses
            found[domain] = mean_of_rows(losses, examples)
        return found

    def _key(self, *adapters: torch.Tensor) -> str:
        """What identifies these adapters (numel,) together: those with B = 0 are all alike, because they do nothing."""
        used = [
            flat
            for flat in adapters
            if any(view.any() for name, view in self._spec.layout.views(flat).items() if ".lora_B." in name)
        ]
        return " ".join(hashlib.sha256(flat.numpy()).hexdigest() for flat in used) or BASE

    def _row_losses(self, examples: Sequence[Example]) -> torch.Tensor:
        return row_losses(
            self.stage.model, examples, pad_id=self.pad_id, batch_size=4, device=CPU, autocast=self._autocast
        )

    def valid_losses(self, rows: int, flat: torch.Tensor, domains: Iterable[str]) -> dict[str, float]:
        """The loss of an adapter (numel,) on at most FIT_ROWS validation rows of each of some domains."""
        self.stage.show(flat)
        return self._shown_losses({domain: self.valid[domain][: min(FIT_ROWS, rows)] for domain in domains})

    def _shown_losses(self, rows: Rows) -> dict[str, float]:
        return {domain: mean_of_rows(self._row_losses(each), each) for domain, each in rows.items()}

    def fitted(self, run: Run, experts: Mapping[str, torch.Tensor]) -> dict[str, Merged]:
        """The merges with the weights that `fedmoe gateway fit` finds on validation rows of these experts' domains."""
        inputs = inputs_of(self.spec(run), experts)
        rows = {name: self.valid[name][: min(FIT_ROWS, run.rows)] for name in experts}
        stacked = side_by_side(inputs.values())
        with Remembering(
            self.stage.model, inputs, rows,
            pad_id=self.pad_id, batch_size=4, device=CPU, autocast=self._autocast, report=lambda line: None,
            adapter=self.stage.show_merged(stacked),
        ) as objective:  # fmt: skip
            found = {
                label: search(objective, n_groups=n_groups, max_passes=FIT_PASSES, present={})
                for label, n_groups in ((FITTED, 1), (FITTED_GROUPS, FIT_GROUPS))
            }
        return {
            label: merge(
                [replace(inputs[name], in_groups=weights) for name, weights in one.weights.items()],
                scale=None,
            )
            for label, one in found.items()
        }

    def training_rows(self, domains: Sequence[str]) -> dict[str, Sequence[Row]]:
        """The training rows of some domains as text."""
        return {name: demo_splits()[name].train for name in domains}

    def _vector(self, name: str) -> torch.Tensor:
        """The vector (d,) of a domain, as workers publish it."""
        if name not in self._vectors:
            mean = self._states(some_of(self.train[name], VECTOR_ROWS)).mean(0)
            self._vectors[name] = DomainVector.of(mean, VECTOR_ROWS).tensor()
        return self._vectors[name]

    def _states(self, examples: Sequence[Example]) -> torch.Tensor:
        model = self.stage.model
        with model.disable_adapter():
            return prompt_states(
                model.get_base_model(), examples, pad_id=self.pad_id, device=CPU, autocast=self._autocast
            )

    def routed(self, rows: int, experts: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The held-out loss on the domains of these experts, each row with the one to which its vector routes it."""
        names = list(experts)
        vectors = torch.stack([self._vector(name) for name in names])
        found: dict[str, float] = {}
        for domain in names:
            examples = list(self.test[domain][:rows])
            if (domain, rows) not in self._prompts:
                self._prompts[domain, rows] = self._states(examples)
            chosen = nearest(self._prompts[domain, rows], vectors).tolist()
            if len(set(chosen)) == 1:
                found |= self.losses(rows, experts[names[chosen[0]]], [domain])
                continue
            losses = torch.zeros(len(examples), dtype=torch.float64)
            for number in set(chosen):
                self.stage.show(experts[names[number]])
                here = [place for place, one in enumerate(chosen) if one == number]
                losses[here] = self._row_losses([examples[place] for place in here])
            found[domain] = mean_of_rows(losses, examples)
        return found

    def arrow(self, rows: int, experts: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The held-out loss on the domains of these experts with peft's arrow over them."""
        adapters = []
        for flat in experts.values():
            buffer = AdapterBuffer(self._spec.layout)
            buffer.flat.copy_(flat)
            adapters.append(Adapter(file=bytes(buffer.file), config=self._spec.adapter_config()))
        base = load_base(self.model_dir, device=CPU, dtype=torch.float32)
        with arrow_loaded(base, adapters) as model:
            linears_in(model, self._autocast)
            return {
                domain: mean_loss(
                    model, self.test[domain][:rows], pad_id=self.pad_id, batch_size=4, device=CPU,
                    autocast=self._autocast,
                )
                for domain in experts
            }  # fmt: skip


def share_of(rows: Rows, plan: WorkerPlan, domains: Sequence[str] = DOMAINS) -> list[Example]:
    """The first part of the domain's rows; for ALL as many of all `domains`, so that small ones come several times."""
    if plan.domain != ALL:
        own = list(rows[plan.domain])
        return own[: max(1, round(len(own) * plan.share))]
    most = max(len(rows[name]) for name in domains)
    return [row for name in domains for row in islice(cycle(rows[name]), most)]


def inputs_of(spec: Spec, experts: Mapping[str, torch.Tensor]) -> dict[str, MergeInput]:
    """The experts as a merge takes them, with equal weights."""
    return {
        name: MergeInput(layout=spec.layout, flat=flat, scaling=spec.lora.scaling, weight=1.0)
        for name, flat in experts.items()
    }


def merges(spec: Spec, experts: Mapping[str, torch.Tensor]) -> dict[str, Merged]:
    """The merges of experts that were trained apart, as the aggregator makes them at fixed scales."""
    inputs = list(inputs_of(spec, experts).values())
    chosen = FIXED | {"svd 1.8": ("svd", 1.8)}
    return {name: merge(inputs, method=method, scale=scale) for name, (method, scale) in chosen.items()}


def sum_of(spec: Spec, adapters: Mapping[str, torch.Tensor], factor: float) -> Merged:
    """The sum of adapters (numel,), times a factor; it is exact, of all their ranks together."""
    weighted = [replace(one, weight=factor) for one in inputs_of(spec, adapters).values()]
    return merge(weighted, scale=None)


def seed_of(text: str) -> int:
    """A number below 2^32 that differs from text to text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def is_expert(chain: str) -> bool:
    """True if a chain is a domain's expert."""
    return chain != GATEWAY


@cache
def demo_splits() -> dict[str, Split]:
    """The rows of DOMAINS, and of HALVES."""
    splits = {
        name: split_by_source(
            SOURCES[name].collect(0), seed=0, train=TRAIN_ROWS, valid=VALID_ROWS, test=TEST_ROWS
        )
        for name in DOMAINS
    }
    halves = [half for split in splits.values() for half in halves_of(split)]
    return splits | dict(zip(HALVES, halves, strict=True))


def halves_of(split: Split) -> tuple[Split, Split]:
    """A domain as two: in each part of the split, every other source goes to the other half."""

    def half(rows: Sequence[Row], number: int) -> tuple[Row, ...]:
        mine = set(sorted({row.source for row in rows})[number::2])
        return tuple(row for row in rows if row.source in mine)

    first, second = (
        Split(train=half(split.train, number), valid=half(split.valid, number), test=half(split.test, number))
        for number in (0, 1)
    )
    return first, second


@cache
def demo_rows() -> Material:
    """The demo's model, and the rows of DOMAINS and HALVES."""
    model_dir = str(ensure_demo_model(cache_directory(), report=print))
    tokenizer = load_tokenizer(model_dir)
    bad_rows = BadRows(report=print)

    def encoded(rows: Sequence[Row], file: Path) -> list[Example]:
        file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
        return list(
            make_examples(open_data(file, bad_rows), tokenizer, TRAINING.max_length, bad_rows).examples
        )

    train, valid, test = {}, {}, {}
    with TemporaryDirectory(prefix="fedmoe-learning-") as scratch:
        for name, split in demo_splits().items():
            train[name] = encoded(split.train, Path(scratch, f"{name}.train.jsonl"))
            valid[name] = encoded(split.valid, Path(scratch, f"{name}.valid.jsonl"))
            test[name] = encoded(split.test, Path(scratch, f"{name}.test.jsonl"))
    return Material(train, valid, test, padding_id(tokenizer), model_dir)
