"""Held-out loss of a federation: evaluates experts and gateway from Redis on rows outside the training data."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import BaseModelError, DataError, SettingsError, SpecError, UnknownExpertError
from fedmoe.model.adapter import adapter_loaded
from fedmoe.protocol.names import GATEWAY, MERGED
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import HeldOutSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.base import Base, base_model_of, load_for_some
from fedmoe.tools.centralised import CENTRALISED, Centralised, Train, centralise
from fedmoe.tools.evaluate import BASE, MEAN, Adapter, Loads, Matrix, evaluate_rows, matrix_of
from fedmoe.tools.export import Export, is_gateway_trained, read_expert, read_gateway
from fedmoe.tools.export_files import CONFIG_FILE, WEIGHTS_FILE
from fedmoe.tools.routed import Routes, arrow_row, vector_row
from fedmoe.tools.routing import BY_ARROW
from fedmoe.tools.rows import Encoder, find_files, find_training_files
from fedmoe.tools.share import ROUTED, routed_losses, shares
from fedmoe.util.versions import version_of

# Fields of peft's LoraConfig with which an adapter computes something else than W + scaling × B A.
_BESIDE_LORA = (
    "use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "layer_replication",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations, by the begin of their names
ROWS = (BASE, ROUTED, BY_ARROW, CENTRALISED)  # rows of the table that are no adapter of the federation


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
        routes: domain -> expert -> number of rows that the domain vectors send to it; empty without vectors.
        centralised: how the row of that name was trained, if it was.
    """

    base_model: str
    base_fingerprint: str
    rows: Mapping[str, int]
    built_from: Mapping[str, Mapping[str, Mapping[str, str | int]]]
    loss: Matrix
    routed: Mapping[str, float | None]
    share: Mapping[str, float | None]
    routes: Routes = field(default_factory=dict)
    centralised: Centralised | None = None


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
    for row, kind in _gateway_rows(store, report).items():
        try:
            adapters[row] = read_gateway(store, kind)
        except (UnknownExpertError, SpecError) as error:
            report(f"the {'merged ' if row == MERGED else ''}gateway is left out: {error}")
    return specs, adapters


def _gateway_rows(store: GatewayStore, report: Callable[[str], None]) -> dict[str, str]:
    """Row of the table -> the kind of gateway in it; a trained one that Redis has lost is reported and left out."""
    try:
        return {GATEWAY: "trained", MERGED: "merged"} if is_gateway_trained(store) else {GATEWAY: "merged"}
    except (UnknownExpertError, SpecError) as error:
        report(f"the gateway is left out: {error}")
        return {MERGED: "merged"}


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
    if odd := _not_plain(config.to_dict()):
        raise SettingsError(
            f"the adapter in {directory} is not plain LoRA ({odd}), and only that can be evaluated here",
            about=odd.partition(" ")[0],
        )
    # The adapter's weights replace the initial ones, so skip special initialisations, some of which take minutes.
    return Adapter(file=file, config=config.to_dict() | {"init_lora_weights": True})


def _not_plain(config: Mapping[str, Any]) -> str:
    """The first field of an adapter's configuration with which it changes more than ΔW = scaling × B A; "" if none."""
    for name in _BESIDE_LORA:
        if config.get(name):
            return f"{name} is {config[name]!r}"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights is {start!r}, which changes the base model too; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain"
        )
    return ""


def measure(
    store: GatewayStore,
    settings: HeldOutSettings,
    *,
    report: Callable[[str], None],
    train: Train | None = None,
) -> HeldOut:
    """Evaluate the base model, every expert, the gateway and the extra adapters on every domain.

    `report` is called with a line for everything that is read, left out or computed. `train` trains the centralised
    adapter, if the settings ask for it.

    Raises:
        FedMoEError: if settings, data, base model and adapters do not fit together.
    """
    bad_rows = BadRows(report=report, file=settings.bad_rows)
    specs, exports = read_federation(store, report)
    test = find_files(settings.data, list(specs))
    training = find_training_files(settings.train, list(specs), test)
    tests, trainings = (
        {name: open_data(file, bad_rows) for name, file in files.items()} for files in (test, training)
    )
    _report_fitted_on(store, tests, report)
    if taken := sorted(settings.extra.keys() & {*exports, *ROWS}):
        raise SettingsError(f"the adapter's name {taken[0]!r} is taken: give it another one", about="name")
    extra = {name: read_directory(directory) for name, directory in settings.extra.items()}
    base, others = _load_base(store, settings, exports, specs, report)
    for name, adapter in extra.items():
        _check_fits(base, name, adapter)
    for name in others:
        for of in (specs, exports, tests, trainings):
            of.pop(name, None)
    if not tests:
        raise DataError(
            f"--data has rows of {', '.join(others)} only, and {base.name} is loaded: give rows of the other experts, "
            "or another --base-model",
            about="data",
        )
    read = {name: Adapter(file=export.file, config=export.config) for name, export in exports.items()}
    experts = {name: read.pop(name) for name in specs}
    arrow = arrow_row(specs, experts, report)
    adapters: dict[str, Loads | None] = {BASE: None, **experts, **arrow, **read, **extra}
    templates = {name: exports[name].chat_template for name in specs}
    metas = {name: exports[name].metas[name] for name in specs}
    encoder = Encoder(
        tokenizer=base.tokenizer,
        config=base.config,
        templates=templates,
        max_length=max(meta.rules.training.max_length for meta in metas.values()),
        learn=settings.learn,
        bad_rows=bad_rows,
        report=report,
    )
    domains = {name: encoder.examples(name, data, sample=settings.rows) for name, data in tests.items()}
    centralised = None
    if train:
        examples = {name: encoder.examples(name, data) for name, data in trainings.items()}
        adapters[CENTRALISED], centralised = centralise(
            base, specs, metas, examples, train,
            steps=settings.steps, learning_rates=settings.rates, batch_size=settings.batch_size, report=report,
        )  # fmt: skip
    losses = evaluate_rows(
        base.model, adapters, domains,
        pad_id=base.pad_id, batch_size=settings.batch_size, device=base.device, autocast=base.autocast,
        report=lambda row: report(f"evaluating {row}"),
    )  # fmt: skip
    by_vectors, routes = vector_row(store, specs, base, domains, losses, report)
    first = {name: losses.pop(name) for name in (BASE, *specs)}
    loss = matrix_of(first | by_vectors | losses, domains)
    routed, share = routed_losses(loss, specs), shares(loss, list(specs))
    _report_undefined(routed, share, specs, report)
    return HeldOut(
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        rows={name: len(examples) for name, examples in domains.items()},
        built_from={name: export.built_from for name, export in exports.items()},
        loss=loss,
        routed=routed,
        share=share,
        routes=routes,
        centralised=centralised,
    )


def _check_fits(base: Base, name: str, adapter: Adapter) -> None:
    """Raise SpecError unless the adapter can be put on the base model; before the rows of the others are computed."""
    try:
        with adapter_loaded(base.model, adapter.file, adapter.config):
            pass
    except SpecError as error:
        raise SpecError(f"--adapter {name}: {error}", about=error.about) from error


def _load_base(
    store: GatewayStore,
    settings: HeldOutSettings,
    exports: Mapping[str, Export],
    specs: Mapping[str, Spec],
    report: Callable[[str], None],
) -> tuple[Base, list[str]]:
    """The base model, and the adapters of another one, which are reported and left out.

    The settings name it, or it is that of most experts with a gateway weight: the table compares with them.

    Raises:
        BaseModelError: if no expert is of that base model, or `--data` or `--train` names one that is not.
    """
    wanted = replace(settings, base_model=settings.base_model or base_model_of(specs, store.experts()))
    metas = {name: exports[name].metas[name] for name in specs}
    templates = {name: exports[name].chat_template for name in specs}
    base, others = load_for_some(wanted, specs, metas, templates, report)
    named = {text.partition("=")[0] for text in (*settings.data, *settings.train) if not Path(text).is_dir()}
    for name in others:
        what = f"an adapter of another base model ({_of(specs[name], metas[name])}) than {base.name}, which is loaded"
        if name in named:
            raise BaseModelError(
                f"{name} is {what}: give no rows of it, or another --base-model", about="base_model"
            )
        report(f"{name} is left out: it is {what}; --base-model chooses another one")
    for name, export in exports.items():
        if name not in specs and not all(
            base.is_of(spec, export.metas[of]) for of, spec in export.specs.items()
        ):
            others.append(name)
            report(f"the {'merged ' if name == MERGED else ''}gateway is left out: it is an adapter of another base "
                   f"model than {base.name}, which is loaded; --base-model chooses another one")  # fmt: skip
    return base, others


def _of(spec: Spec, meta: Meta) -> str:
    return spec.base_model + (f", fingerprint {meta.base_fingerprint}" if meta.base_fingerprint else "")


def _report_fitted_on(
    store: GatewayStore, tests: Mapping[str, DataFile], report: Callable[[str], None]
) -> None:
    """Say which files are those that the merged gateway was fitted on."""
    try:
        fit = store.fit()
        digests = {one.digest for one in fit.rows.values()} if fit and fit.weights else set()
    except SpecError:
        return  # `fedmoe gateway show` says what is wrong with it
    for data in tests.values():
        if data.digest in digests:
            report(
                f"{data.path}: the merged gateway was fitted on these rows, so its loss on them says little: "
                "measure it on others"
            )


def _report_undefined(
    routed: Mapping[str, float | None],
    share: Mapping[str, float | None],
    experts: Collection[str],
    report: Callable[[str], None],
) -> None:
    """Say which domains the share leaves out, or why there is none."""
    without = [column for column, loss in routed.items() if loss is None and column != MEAN]
    if without:
        rest = "the share is that of the other domains" if ROUTED in share else "so there is no share"
        report(f"no expert of its own: {', '.join(without)} (the experts are {', '.join(experts)}); {rest}")
    if share.get(ROUTED, 0.0) is None:
        report("no share: the experts gain nothing over the base model on their own domains")
