"""What must be known of a base model to create an expert: the adapter's layout, its fingerprint, its reach.

Finding that out needs transformers and peft, so a process of its own does it, and the daemon's memory stays that of its
experts.
"""

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from consumers.create.request import SpecRequest
from fedmoe.errors import BaseModelError, SettingsError, StoppedError
from fedmoe.protocol.records import reach_text

logger = logging.getLogger(__name__)

STOPPED = "stopped before it served any expert: nothing is lost"

# What this process has found out about base models. Reading their weights takes long, and a creation is tried again
# while Redis is away or full. Failures are not kept: the base model may have been put right meanwhile.
described: dict[SpecRequest, dict[str, Any]] = {}


def look_at_base(request: SpecRequest, stop: threading.Event) -> dict[str, Any]:
    """What is known of the base model; the first time, what an operator should know of it is logged.

    Raises:
        BaseModelError: if its config cannot be read; SettingsError if the request does not fit it.
        StoppedError: if `stop` is set meanwhile.
    """
    if request not in described:
        found = _describe(request, stop)
        _tell(request, found)
        described[request] = found
    return described[request]


def _tell(request: SpecRequest, described: Mapping[str, Any]) -> None:
    """Say what an operator may not expect of this base model."""
    if described["template_missing"]:
        logger.warning(
            "the base model %s has no chat template: start the first worker with --chat-template FILE",
            request.base_model,
        )
    if described["towers"]:
        logger.info(
            "the parts %s of the base model get no adapter, because text does not pass through them: nothing to do",
            ", ".join(described["towers"]),
        )
    logger.info(
        "the adapter on %s covers %s",
        request.base_model,
        reach_text(described["reach"], described["not_reached"]),
    )


def _describe(request: SpecRequest, stop: threading.Event) -> dict[str, Any]:
    """Ask a process of its own for the adapter's layout and the base model's fingerprint.

    If the weights are here but too large for this machine, that process is killed; then the config has to do, and the
    first worker that joins pins the fingerprint.
    """
    logger.info("looking at the base model %s", request.base_model)
    process = ask_process(_question(request, read_weights=True), stop)
    if process.returncode == -signal.SIGKILL:
        logger.warning(
            "the weights of %s do not fit into memory here; going on by its config", request.base_model
        )
        process = ask_process(_question(request, read_weights=False), stop)
    try:
        answer = json.loads(process.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        raise BaseModelError(
            f"could not look at the base model {request.base_model!r}: {process.stderr.strip()[-800:]}"
        ) from error
    if "error" in answer:
        raise (SettingsError if answer["of_settings"] else BaseModelError)(answer["error"])
    return dict(answer)


def _question(request: SpecRequest, *, read_weights: bool) -> dict[str, Any]:
    return {
        "base_model": request.base_model,
        "rank": request.lora.rank,
        "alpha": request.lora.alpha,
        "targets": list(request.lora.targets),
        "chat_template": request.chat_template,
        "max_length": request.rules.training.max_length,
        "read_weights": read_weights,
    }


def ask_process(question: Mapping[str, Any], stop: threading.Event) -> "subprocess.CompletedProcess[str]":
    """Put a question to `fedmoe.model.describe`, in a process of its own; StoppedError once `stop` is set."""
    with subprocess.Popen(
        [sys.executable, "-m", "fedmoe.model.describe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the daemon, which ends this one
    ) as process:
        text: str | None = json.dumps(question)
        while True:
            try:
                out, err = process.communicate(text, timeout=0.1)
                return subprocess.CompletedProcess(process.args, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                text = None  # communicate goes on with what it was given first
            if stop.is_set():
                process.kill()
                raise StoppedError(STOPPED)
