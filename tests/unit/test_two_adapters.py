"""Two adapters on one base model, as a worker has that trains its expert and the gateway by turns."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from fedmoe.model.adapter import adapter_layout, attach_adapter, switch_to
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import Spec
from producers.trainer import Trainer
from tests.tiny import tiny_config
from tests.unit.test_trainer import CPU, EXAMPLES, SETTINGS, make_model, make_spec


def spec_of(rank: int, *targets: str) -> Spec:
    spec, lora = make_spec(tiny_config(), rank=rank), LoraSettings(rank=rank, targets=targets)
    return replace(spec, lora=lora, layout=adapter_layout(tiny_config(), lora))


ADAPTERS = {
    "ranks": {"expert": spec_of(4, "all-linear"), "gateway": spec_of(2, "all-linear")},
    "targets": {"expert": spec_of(4, "q_proj"), "gateway": spec_of(4, "q_proj", "v_proj")},
}


@pytest.mark.parametrize("specs", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_two_adapters_on_one_model_train_by_turns_as_each_alone(specs: dict[str, Spec]) -> None:
    """To the bit, also of unlike ranks or targets: neither sees the other's values, gradient, moments or position."""
    settings = {"expert": SETTINGS, "gateway": replace(SETTINGS, learning_rate=1e-2)}

    def trainers(shared: PreTrainedModel | None) -> dict[str, Trainer]:
        made, model = {}, shared
        for name, spec in specs.items():
            model = model if shared is not None else make_model(tiny_config())
            model, flat = attach_adapter(model, spec, name)
            made[name] = Trainer(
                model=model, flat=flat, examples=EXAMPLES, pad_id=0, settings=settings[name], seed=3, device=CPU,
                activate=switch_to(model, name),
            )  # fmt: skip
        return made

    by_turns, alone = trainers(make_model(tiny_config())), trainers(None)
    for _ in range(5):
        for name, trainer in by_turns.items():
            assert trainer.step() == alone[name].step()
    for name, trainer in by_turns.items():
        assert torch.equal(trainer.flat, alone[name].flat)
        assert all(torch.equal(value, alone[name].state()[key]) for key, value in trainer.state().items())
    with torch.no_grad():
        by_turns["expert"].flat += 0.1  # a pull
    assert by_turns["gateway"].step() == alone["gateway"].step()
