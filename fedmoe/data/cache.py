"""Keeps a worker's encoded rows beside its checkpoint, so that a restart does not encode them again.

The file holds private rows, so only its owner may read it. It is used only if nothing has changed on which the encoding
depends; otherwise it is replaced.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.encode import Learn
from fedmoe.data.examples import Examples, make_examples
from fedmoe.data.flat import TYPES, FlatExamples
from fedmoe.data.jsonl import DataFile
from fedmoe.util.disk import put_in_place, to_disk
from fedmoe.util.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "rows.safetensors"


class RowCache:
    """The cache in a state directory.

    Args:
        report: prints a line for people.
    """

    def __init__(self, directory: Path, *, report: Callable[[str], None]) -> None:
        self._file = directory / FILE_NAME
        self._report = report

    def examples(
        self,
        data: DataFile,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        bad_rows: BadRows,
        *,
        learn: Learn = "all",
        stopped: Callable[[], bool] = lambda: False,
    ) -> Examples:
        """Return the examples from the cache, else from `make_examples`; raises what that raises."""
        key = cache_key(data, tokenizer, max_length=max_length, learn=learn)
        if kept := self._load(key, data.path):
            self._report(
                f"{shown(data.path)}: taking the tokenized rows that are kept in {shown(self._file)}"
            )
            kept.report(data.path, bad_rows)
            return kept
        made = make_examples(
            data, tokenizer, max_length, bad_rows, learn=learn, report=self._report, stopped=stopped
        )
        if key:
            try:
                self._save(key, made)
            except OSError as error:
                why = error.strerror or error
                self._report(
                    f"cannot write {shown(self._file)} ({why}): the next start tokenizes the rows again"
                )
        return made

    def _load(self, key: str, path: Path) -> Examples | None:
        try:
            with safe_open(self._file, framework="pt") as file:
                if not key or (file.metadata() or {})["key"] != key:
                    return None
                tensors = {name: file.get_tensor(name) for name in (*TYPES, "info")}
                if _digest(tensors) != file.metadata()["digest"]:
                    return None
        except (OSError, SafetensorError, KeyError):
            return None
        info: dict[str, Any] = json.loads(bytes(_bytes(tensors.pop("info"))))
        for name in ("problems", "left_out"):
            info[name] = tuple(Problem(path=path, **problem) for problem in info[name])
        arrays = {name: array(TYPES[name]) for name in TYPES}
        for name, tensor in tensors.items():
            arrays[name].frombytes(_bytes(tensor))
        return Examples(examples=FlatExamples(arrays), **info)

    def _save(self, key: str, made: Examples) -> None:
        info = {name: getattr(made, name) for name in Examples.__dataclass_fields__ if name != "examples"}
        for name in ("problems", "left_out"):
            info[name] = [{k: v for k, v in asdict(p).items() if k != "path"} for p in info[name]]
        arrays = made.examples.arrays
        tensors = {name: torch.frombuffer(arrays[name], dtype=torch.uint8) for name in TYPES}
        tensors["info"] = torch.frombuffer(bytearray(json.dumps(info).encode()), dtype=torch.uint8)
        fresh = self._file.with_suffix(".new")
        try:
            os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
            save_file(tensors, fresh, metadata={"key": key, "digest": _digest(tensors)})
            fresh.chmod(0o600)
            to_disk(fresh)
            put_in_place(fresh, self._file)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            fresh.unlink(missing_ok=True)


def cache_key(data: DataFile, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, learn: Learn) -> str:
    """Digest of everything on which the encoded rows depend; "" if the tokenizer has no description.

    The digest covers the text of the code, because its version does not change with each edit.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return ""
    code = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        code.update(module.read_bytes())
    parts = [
        data.digest, max_length, learn, core.to_str(), tokenizer.chat_template, type(tokenizer).__name__,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        code.hexdigest(), sys.version, sys.byteorder,
        *(version(package) for package in ("transformers", "tokenizers", "jinja2")),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])} ".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data
