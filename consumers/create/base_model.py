"""The facts about a base model needed to create an expert: the adapter's layout, its reach, the model's fingerprint.

A child process finds them with transformers and peft, so the daemon needs memory only for its experts.
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

# Facts that this process has found about base models. Reading their weights takes long, and a creation is retried while
# Redis is away or full. Failures are not cached: the base model may have been repaired meanwhile.
described: dict[SpecRequest, dict[str, Any]] = {}


def look_at_base(request: SpecRequest, stop: threading.Event) -> dict[str, Any]:
    """The facts about the base model; the first call logs those that the operator should know.

    Raises:
        BaseModelError: if its config cannot be read; SettingsError if the request does not fit the model.
        StoppedError: if `stop` is set meanwhile.
    """
    if request not in described:
        found = _describe(request, stop)
        _tell(request, found)
        described[request] = found
    return described[request]


def _tell(request: SpecRequest, described: Mapping[str, Any]) -> None:
    """Log facts about this base model that may surprise the operator."""
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
    """Ask a child process for the adapter's layout and the base model's fingerprint.

    If the weights are too large for this machine, the system kills the child process. Then only the config is read, and
    the first worker that joins pins the fingerprint.
    """
    logger.info("looking at the base model %s", request.base_model)
    process = ask_process(_question(request, read_weights=True), stop)
    if process.returncode == -signal.SIGKILL:
        logger.warning(
            "the weights of %s do not fit into this machine's memory; using only its config",
            request.base_model,
        )
        process = ask_process(_question(request, read_weights=False), stop)
    try:
        answer = json.loads(process.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        raise BaseModelError(
            f"could not inspect the base model {request.base_model!r}: {process.stderr.strip()[-800:]}",
            about="base_model",
        ) from error
    if "error" in answer:
        raise (SettingsError if answer["of_settings"] else BaseModelError)(
            answer["error"], about=answer["about"]
        )
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
    """Run `fedmoe.model.describe` on a question in a child process; raises StoppedError once `stop` is set."""
    with subprocess.Popen(
        [sys.executable, "-m", "fedmoe.model.describe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only the daemon, which then kills this process
    ) as process:
        text: str | None = json.dumps(question)
        while True:
            try:
                out, err = process.communicate(text, timeout=0.1)
                return subprocess.CompletedProcess(process.args, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                text = None  # communicate continues with the input of its first call
            if stop.is_set():
                process.kill()
                raise StoppedError(STOPPED, about="base_model")
