"""fedmoe.tools.evaluate and fedmoe.model.loss: the loss is that of the answers, each adapter's its own."""

import math
from array import array
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from fedmoe.data.encode import Answer, Example
from fedmoe.data.examples import collate
from fedmoe.errors import SpecError
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import structure
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.evaluate import MEAN, Adapter, evaluate, mean_loss
from tests.errors import raises
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"pad_id": 0, "batch_size": 3, "device": CPU}
EXAMPLES = [
    Example(array("i", range(start, start + length)), (Answer(n_prompt, length, 1.0),))
    for start, length, n_prompt in ((5, 9, 4), (40, 4, 3), (90, 17, 2), (7, 12, 11), (1, 2, 1))
]


def reference(model: nn.Module, examples: list[Example]) -> tuple[float, int]:
    """Sum of −log p over the answers' tokens and their number, row by row, from all logits."""
    total, count = 0.0, 0
    for example in examples:
        ids = list(example.input_ids)
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(example.answers[0].start, len(ids)):
            total -= log_p[place - 1, ids[place]].item()
            count += 1
    return total, count


class KeepsAllLogits(nn.Module):
    """A model whose forward does not know `logits_to_keep`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def make_adapter(rank: int, seed: int) -> tuple[Adapter, PeftModel]:
    """A random adapter, and a model that has it."""
    config, lora = tiny_config(), LoraSettings(rank=rank)
    spec = Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )
    model, flat = attach_adapter(tiny_model(), spec)
    flat.add_(randn(seed, flat.numel()), alpha=0.05)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(flat)
    return Adapter(file=buffer.file, config=spec.adapter_config()), model


def test_the_loss_is_that_of_the_answers_tokens() -> None:
    """A padded batch against row by row from all logits; the model may know `logits_to_keep` or not."""
    model = tiny_model()
    total, count = reference(model, EXAMPLES)
    batch = collate(EXAMPLES, pad_id=0)
    assert batch.n_tokens == count
    for one in (model, KeepsAllLogits(model)):
        loss = completion_loss(one, batch, device=CPU, autocast=torch.float32)
        assert loss.item() == pytest.approx(total, rel=1e-5)


def test_the_mean_is_weighed() -> None:
    """An answer of half the weight counts half in the sum and in what it is divided by."""
    model = tiny_model()
    one, other = EXAMPLES[:2]
    half = Example(other.input_ids, (other.answers[0]._replace(weight=0.5),))
    (total, count), (other_total, other_count) = reference(model, [one]), reference(model, [other])
    expected = (total + other_total / 2) / (count + other_count / 2)
    assert mean_loss(model, [one, half], **OPTIONS) == pytest.approx(expected, rel=1e-5)


def test_only_the_logits_that_count_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the column before the first label to the last: of 17 columns, those from the 10th on."""
    model = tiny_model()
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    batch = collate([Example(array("i", range(17)), (Answer(10, 17, 1.0),))], pad_id=0)
    completion_loss(model, batch, device=CPU, autocast=torch.float32)
    peft_model = make_adapter(2, seed=0)[1]
    head = peft_model.get_base_model().lm_head
    head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    completion_loss(peft_model, batch, device=CPU, autocast=torch.float32)
    assert [shape[1] for shape in shapes] == [8, 8]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_mean_is_over_tokens_whatever_the_batches(batch_size: int) -> None:
    """Neither the batch size nor the order of the rows changes it; without rows it is no number."""
    model = tiny_model()
    total, count = reference(model, EXAMPLES)
    options = OPTIONS | {"batch_size": batch_size}
    for examples in (EXAMPLES, EXAMPLES[::-1]):
        assert mean_loss(model, examples, **options) == pytest.approx(total / count, rel=1e-5)
    assert math.isnan(mean_loss(model, [], **options))


def test_every_adapter_is_measured_on_every_domain() -> None:
    """Rows in order, adapters of different rank, each as if it alone had been on the base; then the mean."""
    small, with_small = make_adapter(2, seed=1)
    large, with_large = make_adapter(6, seed=2)
    domains = {"sql": EXAMPLES[:2], "docs": EXAMPLES[2:]}
    rows: list[str] = []
    adapters: dict[str, Adapter | None] = {
        "base": None,
        "sql_expert": small,
        "gateway": large,
        "base again": None,
    }
    matrix = evaluate(tiny_model(), adapters, domains, report=rows.append, **OPTIONS)
    assert list(matrix) == rows == list(adapters)
    for row, expected in (("base", tiny_model()), ("sql_expert", with_small), ("gateway", with_large)):
        losses = {domain: mean_loss(expected, examples, **OPTIONS) for domain, examples in domains.items()}
        assert matrix[row] == pytest.approx(losses | {MEAN: sum(losses.values()) / 2}, rel=1e-5)
    assert matrix["base again"] == matrix["base"] != matrix["gateway"]


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    """A file of rank 2 with a config of rank 3."""
    adapter, _ = make_adapter(2, seed=1)
    wrong = Adapter(file=adapter.file, config=dict(adapter.config) | {"r": 3})
    with raises(SpecError, about="shape"):
        evaluate(tiny_model(), {"broken": wrong}, {"sql": EXAMPLES}, **OPTIONS)
