"""Held-out loss of a federation: evaluates experts and gateway from Redis on rows outside the training data."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftType
from transformers import PreTrainedTokenizerBase

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.examples import make_examples, padding_id
from fedmoe.data.jsonl import open_data
from fedmoe.errors import BaseModelError, DataError, SettingsError, SpecError, UnknownExpertError
from fedmoe.model.base import (
    check_structure,
    choose_device,
    choose_precision,
    fingerprint,
    load_base,
    load_config,
)
from fedmoe.model.bounds import check_examples, check_padding
from fedmoe.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.names import GATEWAY, MERGED, check_name
from fedmoe.protocol.spec import Spec
from fedmoe.settings import HeldOutSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.evaluate import BASE, MEAN, Adapter, Matrix, evaluate
from fedmoe.tools.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Export,
    is_gateway_trained,
    read_expert,
    read_gateway,
)
from fedmoe.tools.share import ROUTED, routed_losses, shares
from fedmoe.util.versions import version_of

ROWS = (BASE, ROUTED)  # rows of the table that are no adapter of the federation


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The result of an evaluation.

    Args:
        base_model, base_fingerprint: of the model that all adapters were loaded onto.
        rows: domain -> number of rows used.
        built_from: row of the matrix -> expert -> its version and weights_commit.
        loss: the matrix; cross entropy per answer token, in nats.
        routed: column -> loss of perfect routing, None without an expert of that domain (see `tools.share`).
        share: row -> its part of the gain of perfect routing, None if undefined; in the order of the table.
    """

    base_model: str
    base_fingerprint: str
    rows: Mapping[str, int]
    built_from: Mapping[str, Mapping[str, Mapping[str, str | int]]]
    loss: Matrix
    routed: Mapping[str, float | None]
    share: Mapping[str, float | None]


def find_files(texts: Sequence[str], experts: Sequence[str]) -> dict[str, Path]:
    """Resolve `expert=file.jsonl`, or a directory with `<expert>.test.jsonl` or `<expert>.jsonl`, to {domain: file}.

    Raises:
        SettingsError: if a text is neither, or a domain occurs twice.
        DataError: if a directory has no file for any of the experts.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if Path(text).is_dir():
            here = _in_directory(Path(text), experts)
        elif equals:
            here = {check_name("domain", name): Path(file)}
        else:
            raise SettingsError(f"--data {text!r} is neither a directory nor expert=file.jsonl", about="data")
        if twice := sorted(found.keys() & here.keys() | {MEAN} & here.keys()):
            why = "is reserved for the mean of all domains" if twice[0] == MEAN else "occurs twice"
            raise SettingsError(f"the domain {twice[0]!r} {why}: give it another name", about=twice[0])
        found |= here
    return found


def _in_directory(directory: Path, experts: Sequence[str]) -> dict[str, Path]:
    found = {}
    for name in experts:
        candidates = (directory / f"{name}.test.jsonl", directory / f"{name}.jsonl")
        if file := next((path for path in candidates if path.is_file()), None):
            found[name] = file
    if not found:
        wanted = ", ".join(f"{name}.test.jsonl" for name in experts)
        raise DataError(
            f"{directory} holds none of {wanted}: name the files, for example --data {experts[0]}=FILE",
            about="data",
        )
    return found


def read_federation(
    store: GatewayStore, report: Callable[[str], None]
) -> tuple[dict[str, Spec], dict[str, Export]]:
    """The domain experts' specs, and the adapters of experts and gateway; unreadable ones are reported and left out.

    The row `gateway` is what `fedmoe gateway export` gives. If that is the trained gateway, `merged` is the merged one.

    Raises:
        UnknownExpertError: if there is no readable expert.
    """
    specs: dict[str, Spec] = {}
    adapters: dict[str, Export] = {}
    for name in store.experts():
        if name == GATEWAY:
            continue
        if name in ROWS:
            report(
                f"{name} is left out, because the table has a row of that name: give its export as --adapter"
            )
            continue
        try:
            specs[name], adapters[name] = store.spec(name), read_expert(store, name)
        except (UnknownExpertError, SpecError) as error:
            specs.pop(name, None)
            report(f"{name} is left out: {error}")
    if not specs:
        raise UnknownExpertError(
            "there are no experts to evaluate yet: start `fedmoe aggregator run`", about="experts"
        )
    rows = {GATEWAY: ""} | ({MERGED: "merged"} if is_gateway_trained(store) else {})
    for row, kind in rows.items():
        try:
            adapters[row] = read_gateway(store, kind)
        except (UnknownExpertError, SpecError) as error:
            report(f"the {'merged ' if kind else ''}gateway is left out: {error}")
    return specs, adapters


def read_directory(directory: Path) -> Adapter:
    """Read a LoRA adapter that peft saved, or an export.

    Raises:
        SettingsError: if the directory does not hold one; says what is missing.
    """
    version = version_of(directory)  # an export may replace the files while they are read
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (version / name).is_file():
            raise SettingsError(f"{directory} is not an adapter's directory: it holds no {name}", about=name)
    try:
        config = PeftConfig.from_pretrained(str(version))
        file = (version / WEIGHTS_FILE).read_bytes()
    except Exception as error:  # peft raises many unrelated types
        raise SettingsError(
            f"the adapter in {directory} cannot be read ({error})", about="adapter"
        ) from error
    if config.peft_type != PeftType.LORA:
        raise SettingsError(
            f"the adapter in {directory} is {config.peft_type}, only LoRA can be evaluated", about="peft_type"
        )
    # The adapter's weights replace the initial ones, so skip special initialisations, some of which take minutes.
    return Adapter(file=file, config=config.to_dict() | {"init_lora_weights": True})


def measure(store: GatewayStore, settings: HeldOutSettings, *, report: Callable[[str], None]) -> HeldOut:
    """Evaluate the base model, every expert, the gateway and the extra adapters on every domain.

    `report` is called with a line for everything that is read, left out or computed.

    Raises:
        FedMoEError: if settings, data, base model and adapters do not fit together.
    """
    bad_rows = BadRows(report=report, file=settings.bad_rows)
    specs, exports = read_federation(store, report)
    files = {name: open_data(file, bad_rows) for name, file in find_files(settings.data, list(specs)).items()}
    adapters: dict[str, Adapter | None] = {BASE: None}
    adapters |= {name: Adapter(file=export.file, config=export.config) for name, export in exports.items()}
    for name, directory in settings.extra.items():
        if name in adapters or name in ROWS:
            raise SettingsError(f"the adapter's name {name!r} is taken: give it another one", about="name")
        adapters[name] = read_directory(directory)
    base_model = settings.base_model or next(iter(specs.values())).base_model
    config = load_config(base_model)
    for spec in specs.values():
        check_structure(config, spec.base_config)
    device = choose_device(settings.device)
    autocast = choose_precision(settings.precision, device)
    report(f"loading {base_model} on {device}")
    dtype = autocast if device.type != "cpu" else torch.float32  # like a worker
    tokenizer = load_tokenizer(base_model)
    model = load_base(base_model, device=device, dtype=dtype)
    print_of_base = fingerprint(model)
    max_length = max(store.meta(name).rules.training.max_length for name in specs)
    templates = {name: exports[name].chat_template for name in specs}
    _check_base(store, print_of_base, tokenizer, templates)
    check_padding(tokenizer, config, base_model)
    domains = {}
    for name, data in files.items():  # a domain without an expert uses the first expert's template
        with_template = _with_template(tokenizer, templates.get(name, next(iter(templates.values()))))
        made = make_examples(
            data,
            with_template,
            max_length,
            bad_rows,
            learn=settings.learn,
            sample=settings.rows,
            report=report,
        )
        report(f"{data.path}: {made.summary()}")
        check_examples(made.examples, data.path, tokenizer, config)
        domains[name] = made.examples
    loss = evaluate(
        model, adapters, domains,
        pad_id=padding_id(tokenizer), batch_size=settings.batch_size, device=device, autocast=autocast,
        report=lambda row: report(f"evaluating {row}"),
    )  # fmt: skip
    routed, share = routed_losses(loss, specs), shares(loss, list(specs))
    _report_undefined(routed, share, report)
    return HeldOut(
        base_model=base_model,
        base_fingerprint=print_of_base,
        rows={name: len(examples) for name, examples in domains.items()},
        built_from={name: export.built_from for name, export in exports.items()},
        loss=loss,
        routed=routed,
        share=share,
    )


def _report_undefined(
    routed: Mapping[str, float | None], share: Mapping[str, float | None], report: Callable[[str], None]
) -> None:
    """Say which domains the share leaves out, or why there is none."""
    without = [column for column, loss in routed.items() if loss is None and column != MEAN]
    if without:
        report(f"no expert of its own: {', '.join(without)}; the share is that of the other domains")
    if share.get(ROUTED, 0.0) is None:
        report("no share: the experts gain nothing over the base model on their own domains")


def _check_base(
    store: GatewayStore, print_of_base: str, tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str]
) -> None:
    """Raise BaseModelError if an expert is trained on another base model, or with another tokenizer or template."""
    for name, template in templates.items():
        with_template = _with_template(tokenizer, template)
        here = BaseIdentity(fingerprint=print_of_base, tokenizer=tokenizer_fingerprint(with_template))
        if refusal := here.refusal(store.meta(name), name):
            raise BaseModelError(refusal, about=here.differing(store.meta(name))[0])


def _with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with the expert's own chat template."""
    if not template:
        return tokenizer
    other = copy(tokenizer)
    other.chat_template = template
    return other
