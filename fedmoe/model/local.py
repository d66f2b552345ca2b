"""Files of a base model on this machine; free of torch and transformers, and of the network."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def local_file(base_model: str, name: str) -> Path | None:
    """The file of that name in the directory or the local hub cache, else None; uses no network."""
    if Path(base_model).is_dir():
        path = Path(base_model) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(base_model, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def has_tokenizer(base_model: str) -> bool:
    """True if a tokenizer is in the directory or the local hub cache; uses no network."""
    return any(local_file(base_model, name) for name in TOKENIZER_FILES)
