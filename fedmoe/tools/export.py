"""An expert or the gateway as a directory that `PeftModel.from_pretrained` loads; needs neither peft nor a model.

adapter_model.safetensors   the bytes that Redis holds
adapter_config.json         for peft
fedmoe.json                 the versions and commits it was built from
chat_template.jinja         if the expert has its own chat template
README.md                   a model card

These files are links, and an export switches all of them at once (fedmoe/util/versions.py).
"""

import errno
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedmoe import __version__
from fedmoe.errors import (
    DamagedExpertError,
    RemovedExpertError,
    SettingsError,
    SpecError,
    UnknownExpertError,
)
from fedmoe.protocol.federation import Federation
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.names import GATEWAY, check_expert
from fedmoe.protocol.records import Meta
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.util.disk import write_file
from fedmoe.util.versions import HOME, replace_together

WEIGHTS_FILE, CONFIG_FILE, INFO_FILE, CARD_FILE, TEMPLATE_FILE = (
    "adapter_model.safetensors", "adapter_config.json", "fedmoe.json", "README.md", "chat_template.jinja",
)  # fmt: skip
FILES = (
    INFO_FILE,
    WEIGHTS_FILE,
    CARD_FILE,
    CONFIG_FILE,
)  # the first file marks a FedMoE export; readers look for the last file first
_STAGING_BEFORE = re.compile(r"\.fedmoe-[0-9a-f]{8}")  # staging directories of earlier releases
MERGED_NAME = "merged gateway"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # accepted by vLLM's --max-lora-rank
VLLM_DEFAULT_RANK = 16
_WHAT = {
    MERGED_NAME: "The merge of all experts",
    GATEWAY: "The gateway, trained by the workers of all experts,",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An adapter to write.

    Args:
        name: of the expert, or "merged gateway".
        file: the safetensors file.
        config: content of adapter_config.json.
        built_from: expert -> its version and weights_commit.
        behind: expert -> its present version, for experts that changed since the gateway was built.
        info: further fields of fedmoe.json.
        chat_template: of its workers, "" for the base model's own.
    """

    name: str
    file: bytes
    config: Mapping[str, Any]
    built_from: Mapping[str, Mapping[str, str | int]]
    behind: Mapping[str, int]
    info: Mapping[str, Any]
    chat_template: str = ""

    @property
    def versions(self) -> str:
        """For people, for example: docs_expert v3, sql_expert v12."""
        return ", ".join(f"{name} v{part['version']}" for name, part in self.built_from.items())


def read_expert(store: GatewayStore, name: str) -> Export:
    """Read an expert from Redis.

    Raises:
        UnknownExpertError: names the existing experts.
    """
    spec = store.spec(check_expert(name))
    meta, file = store.read(name)
    return Export(
        name=name,
        file=file,
        config=spec.adapter_config(),
        built_from={name: {"version": meta.version, "weights_commit": meta.weights_commit}},
        behind={},
        info={
            "base_model": spec.base_model,
            "base_fingerprint": meta.base_fingerprint,
            "updated_at": meta.updated_at,
            "lineage": meta.lineage,
            "spec": meta.spec,
            "n_examples": meta.n_examples,
        },
        chat_template=expert_template(spec, meta),
    )


def read_gateway(store: GatewayStore, kind: str = "") -> Export:
    """Read the gateway from Redis: by default the trained one if workers trained it, else the merged one.

    Args:
        store: of the federation.
        kind: "trained" or "merged"; "" for the default.

    Raises:
        UnknownExpertError: if there is none of that kind yet; says why and what to do.
        SpecError: if the merged gateway's meta is malformed.
    """
    if kind == "merged" or not (kind or is_gateway_trained(store)):
        return read_merged(store)
    try:
        return read_expert(store, GATEWAY)
    except DamagedExpertError:
        raise
    except UnknownExpertError as error:
        raise UnknownExpertError(
            "this federation trains no gateway: let the workers of an expert train it (fedmoe expert set EXPERT "
            "--train both), or take the merged one (--kind merged)",
            about="gateway",
        ) from error


def is_gateway_trained(store: GatewayStore) -> bool:
    """True if the federation has a trained gateway to which an update was applied."""
    try:
        return store.meta(GATEWAY).version > 0
    except (UnknownExpertError, RemovedExpertError, SpecError):
        return False


def read_merged(store: GatewayStore) -> Export:
    """Read the merged gateway from Redis, even if experts changed since it was built; raises as `read_gateway`."""
    loaded = store.load_merged()
    if loaded is None:
        raise UnknownExpertError(_why_no_gateway(Inspector(store.connection).federation()), about="gateway")
    merged, file = loaded
    config = merged.config
    if not {"base_model_name_or_path", "r"} <= config.keys() or merged.updated_at is None:
        raise SpecError("the merged gateway's meta hash is malformed; was it edited by hand?", about="config")
    built_from: dict[str, dict[str, str | int]] = {n: one._asdict() for n, one in merged.experts.items()}
    info = {
        "base_model": str(config["base_model_name_or_path"]),
        "updated_at": merged.updated_at,
        "settings": merged.settings,
    }
    metas = store.metas()
    metas.pop(GATEWAY, None)
    commits = {name: part["weights_commit"] for name, part in built_from.items()}
    prints = {meta.base_fingerprint for meta in metas.values()}
    return Export(
        name=MERGED_NAME,
        file=file,
        config=config,
        built_from=built_from,
        behind={n: meta.version for n, meta in metas.items() if meta.weights_commit != commits.get(n)},
        info=info | {"base_fingerprint": prints.pop() if len(prints) == 1 else ""},
        chat_template=_common_template(store, metas),
    )


def _common_template(store: GatewayStore, metas: Mapping[str, Meta]) -> str:
    """The chat template that all experts share, "" if they differ."""
    templates = {expert_template(store.spec(name), meta) for name, meta in metas.items()}
    return templates.pop() if len(templates) == 1 else ""


def _why_no_gateway(federation: Federation) -> str:
    merged = federation.merged
    if merged.error:
        return f"there is no merged gateway yet, because it cannot be built: {merged.error}"
    if not federation.experts:
        return "there is no gateway yet, and no expert: start `fedmoe aggregator run`"
    if merged.lease:
        return "there is no gateway yet: the aggregator builds it in a moment, try again"
    return "there is no gateway yet and no aggregator to build it: start `fedmoe aggregator run`"


def vllm_hint(rank: int) -> str:
    """The option that vLLM needs to serve an adapter of this rank, "" if its defaults suffice."""
    if rank <= VLLM_DEFAULT_RANK:
        return ""
    fits = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fits is None:
        return f"vLLM serves no adapter of a rank above {VLLM_RANKS[-1]}: for vLLM, export with --rank {VLLM_RANKS[-1]}"
    smaller = max(allowed for allowed in VLLM_RANKS if allowed < rank)
    return f"vLLM needs --max-lora-rank {fits} to serve it; `fedmoe gateway export --rank {smaller}` lowers its rank"


def write(directory: str | Path, export: Export, *, force: bool = False) -> str:
    """Write the adapter atomically; an earlier export in the directory is replaced in one step.

    Args:
        directory: created if it does not exist.
        export: the adapter to write.
        force: write even if the directory holds other files; only files of the same names are replaced.

    Returns:
        A warning for programs that were reading the directory meanwhile, "" if none is needed.

    Raises:
        SettingsError: if the directory cannot be written, or holds other files.
        SpecError: if the weights in Redis are not a safetensors file.
    """
    target = Path(directory).resolve()
    try:
        _check_target(target, force=force)
        before = _config_in(target)
        if before is not None and not force:
            _check_replaceable(target, before, export.config)
        names = (*FILES[:-1], TEMPLATE_FILE, FILES[-1]) if export.chat_template else FILES
        replace_together(target, names, lambda version: _write_files(version, export))
        if (
            template := target / TEMPLATE_FILE
        ).is_symlink() and not template.exists():  # of an earlier export
            template.unlink()
        _remove_staging_of_before(target)
    except OSError as error:
        raise SettingsError(_explain(error, target, len(export.file)), about="disk") from error
    if before in (None, export.config):
        return ""
    return (
        f"{directory} held an adapter of another configuration: a program that was loading it just now may have mixed "
        "the old configuration with the new weights, load the adapter again there"
    )


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SettingsError(f"{target} is a file: choose a directory", about="file")
    if (
        target / "config.json"
    ).exists():  # even with force: the bare model could no longer be loaded from this directory
        raise SettingsError(
            f"{target} holds a model (config.json), which would then always be loaded with this adapter: choose "
            "another directory",
            about="config.json",
        )
    if force or not target.is_dir() or (target / INFO_FILE).exists():
        return
    if any(path.name != HOME and not _STAGING_BEFORE.fullmatch(path.name) for path in target.iterdir()):
        what = "an adapter" if (target / CONFIG_FILE).exists() else "files"
        raise SettingsError(
            f"{target} holds {what} that FedMoE did not export: choose another directory, or --force to write into it",
            about=what.removeprefix("an "),
        )


def _config_in(target: Path) -> dict[str, Any] | None:
    """The present adapter configuration; None if it is missing or cannot be read."""
    try:
        config = json.loads((target / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _check_replaceable(target: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise SettingsError if a reader could combine the old configuration with the new weights unnoticed.

    Equal configurations do no harm, and with another rank the shapes do not fit, so peft raises an error.
    """
    old, new = _beside_rank(before), _beside_rank(now)
    if odd := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise SettingsError(
            f"{target} holds an adapter of another kind ({odd[0]} {old.get(odd[0])!r}, now {new.get(odd[0])!r}), and a "
            "program that loads it while it is replaced could mix both: choose another directory, or --force",
            about=odd[0],
        )


def _beside_rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with alpha / rank in place of alpha and rank."""
    rest = {key: value for key, value in config.items() if key not in ("r", "lora_alpha")}
    try:
        return rest | {"lora_alpha / r": config["lora_alpha"] / config["r"]}
    except (LookupError, TypeError, ZeroDivisionError):
        return rest


def _remove_staging_of_before(target: Path) -> None:
    """Remove staging directories, in the target or beside it, that a killed earlier release left over an hour ago."""
    for path in (*target.iterdir(), *target.parent.iterdir()):
        if (
            _STAGING_BEFORE.fullmatch(path.name)
            and path.is_dir()
            and time.time() - path.stat().st_mtime > 3600
            and {inner.name for inner in path.iterdir()} <= set(FILES)
        ):
            shutil.rmtree(path, ignore_errors=True)


def _write_files(directory: Path, export: Export) -> None:
    info = {"name": export.name, "built_from": export.built_from, "behind": export.behind}
    info |= {"exported_by": f"fedmoe {__version__}"} | dict(export.info)
    for name, content in (
        (WEIGHTS_FILE, export.file),
        (CONFIG_FILE, _json(export.config)),
        (INFO_FILE, _json(info)),
        (CARD_FILE, _card(export).encode()),
        *([(TEMPLATE_FILE, export.chat_template.encode())] if export.chat_template else []),
    ):
        write_file(directory / name, [content])
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="np"):
            pass  # opening reads the header and checks the length
    except SafetensorError as error:
        raise SpecError(
            f"the weights of {export.name} in Redis are not a safetensors file ({error}); "
            "was the key written by something else?",
            about="safetensors",
        ) from error


def _explain(error: OSError, target: Path, size: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for {target}, {size / 2**20:.0f} MiB are needed: free some or choose another disk"
        )
    if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
        return (
            f"cannot write to {target} ({error.strerror}): choose a directory you may write to, on a file system that "
            "has symbolic links"
        )
    return f"cannot write to {target} ({error.strerror}): choose a directory you may write to"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _card(export: Export) -> str:
    """The model card; its front matter names the base model only if that may be a hub id."""
    base = export.info["base_model"]
    front = [f"base_model: {base}"] if _HUB_ID.fullmatch(base) else []
    front += ["library_name: peft", "tags:", "- lora", "- fedmoe"]
    rows = [
        f"| {name} | {part['version']} | `{part['weights_commit']}` |"
        for name, part in export.built_from.items()
    ]
    what = _WHAT.get(export.name, "One expert")
    return "\n".join(
        [
            "---", *front, "---",
            f"# {export.name}", "",
            f"{what} of a FedMoE federation: a LoRA adapter of rank {export.config.get('r')} for `{base}`.", "",
            "| built from | version | commit |", "| --- | --- | --- |", *rows, "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            'model = PeftModel.from_pretrained(base, "the/directory/of/this/file")',
            "```", "",
        ]
    )  # fmt: skip
