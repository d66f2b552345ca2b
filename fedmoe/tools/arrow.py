"""The experts' adapters on a model at once, among which peft's Arrow routes each token in each layer."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn
from transformers import PreTrainedModel

from fedmoe.errors import SpecError
from fedmoe.tools.evaluate import Adapter
from fedmoe.tools.export_files import CONFIG_FILE, WEIGHTS_FILE
from fedmoe.tools.routing import ARROW


@contextmanager
def arrow_loaded(model: PreTrainedModel, adapters: Sequence[Adapter]) -> Iterator[nn.Module]:
    """Put peft's arrow router over these adapters on the model for the duration of the context.

    Raises:
        SpecError: if they do not fit the model.
    """
    with TemporaryDirectory(prefix="fedmoe-arrow-") as scratch:
        places = []
        for number, adapter in enumerate(adapters):
            places.append(place := Path(scratch, str(number)))
            place.mkdir()
            (place / WEIGHTS_FILE).write_bytes(adapter.file)
            (place / CONFIG_FILE).write_bytes(json.dumps(dict(adapter.config)).encode())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # as in fedmoe/model/adapter.py
                routed = create_arrow_model(model, [str(place) for place in places], ArrowConfig(**ARROW))
        except (ValueError, TypeError, RuntimeError) as error:
            raise SpecError(f"arrow does not fit these adapters ({error})", about="arrow") from error
    adapted: PeftModel = routed.eval()
    for layer in adapted.modules():
        if isinstance(layer, ArrowLoraLinearLayer):  # under autocast, peft mixes dtypes there, and fails
            layer.forward = torch.autocast(model.device.type, enabled=False)(layer.forward)
    try:
        yield adapted
    finally:
        adapted.unload()
