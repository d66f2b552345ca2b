"""Trains one adapter on the rows of all experts at one place, with a worker's own trainer, for `fedmoe evaluate`."""

import time
from collections.abc import Callable

from fedmoe.model.adapter import attach_adapter
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.tools.centralised import CENTRALISED, Job
from producers.trainer import Trainer

REPORT_INTERVAL_S = 10.0


def train(job: Job, report: Callable[[str], None]) -> memoryview:
    """Train the adapter from its initial weights, and return its safetensors file."""
    model, flat = attach_adapter(job.base.model, job.spec)
    try:
        trainer = Trainer(
            model=model,
            flat=flat,
            examples=job.examples,
            pad_id=job.base.pad_id,
            settings=job.training,
            seed=job.spec.init_seed,
            device=job.base.device,
            autocast=job.base.autocast,
        )
        said_at = time.monotonic()
        for step in range(1, job.steps + 1):
            done = trainer.step()
            if time.monotonic() - said_at >= REPORT_INTERVAL_S:
                said_at = time.monotonic()
                report(f"{CENTRALISED}: step {step} of {job.steps}, loss {done.loss:.3f}")
        buffer = AdapterBuffer(job.spec.layout)
        buffer.flat.copy_(flat)
        return buffer.file
    finally:
        model.unload()
