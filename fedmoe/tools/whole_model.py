"""A whole model directory: the base model with an adapter merged into its weights, and its tokenizer.

Programs that take no adapter load it: llama.cpp's converter (and so Ollama), TGI.

config.json, generation_config.json, model*.safetensors   as transformers saves them
tokenizer.json, chat_template.jinja, …                    the tokenizer with the chat template of the workers
fedmoe.json                                               the versions and commits it was built from
README.md                                                 a model card
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from fedmoe.errors import SettingsError, SpecError
from fedmoe.model.adapter import adapter_loaded
from fedmoe.protocol.identity import expert_template
from fedmoe.settings import HeldOutSettings
from fedmoe.tools.base import load
from fedmoe.tools.card import card
from fedmoe.tools.export import Export
from fedmoe.tools.export_files import (
    CARD_FILE,
    CONFIG_FILE,
    INFO_FILE,
    MODEL_CONFIG_FILE,
    explain,
    info_of,
    json_bytes,
    model_in,
)
from fedmoe.tools.rows import with_template
from fedmoe.util.disk import to_disk, write_file
from fedmoe.util.versions import HOME, replace_together

GENERATION_FILE = "generation_config.json"
WHOLE_MODEL = "whole_model"  # the field of fedmoe.json that marks such a directory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_model(
    directory: Path,
    export: Export,
    *,
    base_model: str = "",
    dtype: str = "",
    device: str = "cpu",
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Load the base model, merge the adapter into it, and write both as one model; returns its bytes.

    Args:
        directory: created if it does not exist; an earlier model of this function is replaced in one step.
        export: the adapter, in fp32.
        base_model: hub id or directory of the base model on this machine; "" is as the spec says.
        dtype: of the weights, fp32 or bf16; "" is the base checkpoint's own.
        device: to merge on.
        force: write even if the directory holds other files, but never over an adapter or another model.
        report: gets a line for each step.

    Raises:
        SettingsError: if the directory cannot be written, or holds a model that this function did not write.
        BaseModelError: if the base model is not the one that the experts were trained on.
        SpecError: if the adapter does not fit, or makes values that are not finite.
    """
    target = directory.resolve()
    _check_target(target, force=force)
    templates = {name: expert_template(spec, export.metas[name]) for name, spec in export.specs.items()}
    name = base_model or str(export.info["base_model"])
    settings = HeldOutSettings(data=(), base_model=name, device=device)
    weights_dtype: torch.dtype | str = DTYPES[dtype] if dtype else "auto"
    base = load(settings, export.specs, export.metas, templates, report, dtype=weights_dtype)
    with adapter_loaded(base.model, export.file, export.config) as adapted:
        report(f"merging {export.name} into {base.name}")
        try:
            # safe_merge checks that every value is finite
            model = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise SpecError(
                f"{export.name} cannot be merged into the base model ({error})", about="values"
            ) from error
    tokenizer = with_template(base.tokenizer, export.chat_template)
    generation = model.generation_config
    generation.eos_token_id = base.end_ids(tokenizer) or None
    # Many a checkpoint has sampling values beside do_sample false. transformers loads that, but refuses to save it.
    model.generation_config = GenerationConfig()

    def write(version: Path) -> None:
        model.save_pretrained(version)
        generation.to_json_file(version / GENERATION_FILE)
        tokenizer.save_pretrained(version)
        write_file(
            version / INFO_FILE,
            [json_bytes(info_of(export) | {WHOLE_MODEL: True, "dtype": _name(model.dtype)})],
        )
        write_file(version / CARD_FILE, [card(export, model_dtype=_name(model.dtype)).encode()])
        for path in version.rglob("*"):
            to_disk(path)

    size: int = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        _check_room(target, size)
        replace_together(target, write, first=INFO_FILE, last=MODEL_CONFIG_FILE)
    except OSError as error:
        raise SettingsError(explain(error, target, size), about="disk") from error
    except SafetensorError as error:  # its own name for what the disk refuses
        raise SettingsError(
            f"cannot write the model to {target} ({error}): free some space or choose another disk",
            about="disk",
        ) from error
    return size


def _name(dtype: torch.dtype) -> str:
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SettingsError(f"{target} is a file: choose a directory", about="file")
    if not target.is_dir() or _is_ours(target):
        return
    if found := model_in(target):  # even with force
        raise SettingsError(
            f"{target} holds a model ({found}) that FedMoE did not write, and none is overwritten: choose another "
            "directory",
            about=found,
        )
    if (
        target / CONFIG_FILE
    ).exists():  # even with force: it would be loaded a second time onto the merged model
        raise SettingsError(
            f"{target} holds an adapter, which would then be loaded onto the merged model too: choose another "
            "directory",
            about=CONFIG_FILE,
        )
    if not force and any(path.name != HOME for path in target.iterdir()):
        raise SettingsError(
            f"{target} holds files that FedMoE did not write: choose another directory, or --force to write into it",
            about="files",
        )


def _is_ours(target: Path) -> bool:
    try:
        return json.loads((target / INFO_FILE).read_bytes())[WHOLE_MODEL] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _check_room(target: Path, size: int) -> None:
    """Raise SettingsError before the disk is filled with half a model."""
    there = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise SettingsError(
            f"{target} needs {size / 2**20:.0f} MiB, {free / 2**20:.0f} are free: free some or choose another disk",
            about="disk",
        )
