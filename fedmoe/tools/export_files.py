"""An export as a directory: an adapter that `PeftModel.from_pretrained` loads. Needs neither peft nor a model.

adapter_model.safetensors   the values that Redis holds, as fp32 or rounded to bf16
adapter_config.json         for peft
fedmoe.json                 the versions and commits it was built from
README.md                   a model card
tokenizer.json, …           the tokenizer with which its workers trained, if it is on this machine
chat_template.jinja         the chat template of its workers, or the tokenizer's

These files are links, and an export switches all of them at once (fedmoe/util/versions.py).
"""

import errno
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedmoe import __version__
from fedmoe.errors import SettingsError, SpecError
from fedmoe.tools.card import card
from fedmoe.tools.export import Export
from fedmoe.util.disk import write_file
from fedmoe.util.versions import HOME, replace_together

WEIGHTS_FILE, CONFIG_FILE, INFO_FILE, CARD_FILE, TEMPLATE_FILE = (
    "adapter_model.safetensors", "adapter_config.json", "fedmoe.json", "README.md", "chat_template.jinja",
)  # fmt: skip
MODEL_CONFIG_FILE = "config.json"
# `fedmoe gateway follow`: the link that it moves to the version that is served, and what it holds while it runs.
CURRENT, LOCK = "current", ".lock"
FILES = (INFO_FILE, WEIGHTS_FILE, CARD_FILE, CONFIG_FILE)
MODEL_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "consolidated*.pth",
    "consolidated*.safetensors",
    "*.gguf",
)
_STAGING_BEFORE = re.compile(r"\.fedmoe-[0-9a-f]{8}")  # staging directories of earlier releases


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
        # The first file marks an export of FedMoE; a reader looks for the last one first.
        replace_together(
            target, lambda version: write_files(version, export), first=INFO_FILE, last=CONFIG_FILE
        )
        _remove_staging_of_before(target)
    except OSError as error:
        raise SettingsError(explain(error, target, len(export.file)), about="disk") from error
    if before in (None, export.config):
        return ""
    return (
        f"{directory} held an adapter of another configuration: a program that was loading it just now may have mixed "
        "the old configuration with the new weights, load the adapter again there"
    )


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SettingsError(f"{target} is a file: choose a directory", about="file")
    is_of_follow = (target.parent / CURRENT).is_symlink() and (target.parent / LOCK).exists()
    if is_of_follow and (target / INFO_FILE).exists():
        raise SettingsError(
            f"{target} is a version that `fedmoe gateway follow` wrote, and a server may have loaded it: choose "
            "another directory",
            about=CURRENT,
        )
    if found := model_in(
        target
    ):  # even with force: the bare model could no longer be loaded from this directory
        raise SettingsError(
            f"{target} holds a model ({found}), which would then always be loaded with this adapter: choose "
            "another directory",
            about=found,
        )
    if force or not target.is_dir() or (target / INFO_FILE).exists():
        return
    if any(path.name != HOME and not _STAGING_BEFORE.fullmatch(path.name) for path in target.iterdir()):
        what = "an adapter" if (target / CONFIG_FILE).exists() else "files"
        raise SettingsError(
            f"{target} holds {what} that FedMoE did not export: choose another directory, or --force to write into it",
            about=what.removeprefix("an "),
        )


def model_in(directory: Path) -> str:
    """The name of a file in the directory that belongs to a whole model, "" if there is none."""
    names = (MODEL_CONFIG_FILE, *MODEL_WEIGHTS)
    return next((path.name for name in names for path in sorted(directory.glob(name))), "")


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


def write_files(directory: Path, export: Export) -> None:
    """Write the adapter's files to an empty directory, and wait until they are on disk.

    Raises:
        OSError: if the disk refuses.
        SpecError: if the weights in Redis are not a safetensors file.
    """
    content = dict(export.extra)
    if export.chat_template:
        content[TEMPLATE_FILE] = export.chat_template.encode()
    content |= {
        WEIGHTS_FILE: export.file,
        CONFIG_FILE: json_bytes(export.config),
        INFO_FILE: json_bytes(info_of(export)),
        CARD_FILE: card(export).encode(),
    }
    for name, data in content.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)  # of the tokenizer's further chat templates
        write_file(file, [data])
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="np"):
            pass  # opening reads the header and checks the length
    except SafetensorError as error:
        raise SpecError(
            f"the weights of {export.name} in Redis are not a safetensors file ({error}); "
            "was the key written by something else?",
            about="safetensors",
        ) from error


def info_of(export: Export) -> dict[str, Any]:
    """Content of fedmoe.json."""
    info = {
        "name": export.name,
        "kind": export.kind,
        "built_from": export.built_from,
        "behind": export.behind,
    }
    return info | {"dtype": export.dtype, "exported_by": f"fedmoe {__version__}"} | dict(export.info)


def explain(error: OSError, target: Path, size: int) -> str:
    """Why the directory cannot be written, and what to do; `size` in bytes is what is to be written."""
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


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON for a file that people read."""
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
