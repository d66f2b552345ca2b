"""The whole thing as real processes: an aggregator, two workers of one expert, one of another."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.spec import Spec
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.processes import eventually, fedmoe, running, terminate


def write_rows(path: Path, question: str, answer: str) -> Path:
    rows = [{"prompt": f"{question} {n}", "completion": f"{answer} {n % 3}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.timeout(300)
def test_two_experts_learn_from_three_workers(
    tmp_path: Path, redis_url: str, connect: Callable[[], Connection], tiny_model_dir: Path
) -> None:
    """Versions advance, losses fall, workers leave with exit code 0, and the exported adapters are the weights."""
    store = GatewayStore(connect())
    red, blue = (
        write_rows(tmp_path / "red.jsonl", "colour", "red red red"),
        write_rows(tmp_path / "blue.jsonl", "what", "blue blue"),
    )
    with ExitStack() as stack:
        aggregator = stack.enter_context(
            running(
                tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "red",
                "--expert", "blue", "--base-model", str(tiny_model_dir), "--rank", "4", "--sync-interval", "0.5",
                "--learning-rate", "0.003", "--gateway-interval", "0.3",
            )
        )  # fmt: skip
        workers = [
            stack.enter_context(
                running(
                    tmp_path / f"{name}.log", "worker", "run", "--redis", redis_url, "--stream", stream,
                    "--data", str(data), "--name", name, "--log-interval", "0.5",
                )
            )
            for name, stream, data in (("anna", "red", red), ("ben", "red", red), ("carl", "blue", blue))
        ]  # fmt: skip
        eventually(
            "twelve versions of each expert",
            lambda: store.meta("red").version >= 12 <= store.meta("blue").version,
            timeout_s=120,
        )
        assert [terminate(worker) for worker in workers] == [0, 0, 0]
        present = {name: store.meta(name).weights_commit for name in ("red", "blue")}
        eventually(
            "a gateway of the last versions",
            lambda: {n: b.weights_commit for n, b in store.merged().experts.items()} == present,
        )
        assert terminate(aggregator) == 0

    for name in ("red", "blue"):
        check_log(connect(), store, name)
    assert [set(store.vectors(name)) for name in ("red", "blue")] == [{"anna", "ben"}, {"carl"}]
    check_losses(redis_url, red, blue)
    for log in ("anna", "ben", "carl"):
        text = (tmp_path / f"{log}.log").read_text()
        assert "40 used" in text
        assert "done:" in text
        assert "Traceback" not in text

    for arguments, out in ((("--expert", "red"), "red"), ((), "gateway")):
        done = fedmoe("gateway", "export", "--redis", redis_url, "--out", str(tmp_path / out), *arguments)
        assert done.returncode == 0, done.stderr
    check_expert_logits(tmp_path / "red", store.spec("red"), store.read("red")[1], tiny_model_dir)
    check_gateway_logits(tmp_path / "gateway", store, tiny_model_dir)


def check_log(connection: Connection, store: GatewayStore, name: str) -> None:
    """One line for each version, in order, and each staleness is what was applied since its worker's pull."""
    log = [line for _, line in connection.client.xrange(f"fedmoe:{{{name}}}:log")]
    assert [int(line[b"version"]) for line in log] == list(range(1, store.meta(name).version + 1))
    for line in log:
        assert int(line[b"base_version"]) + int(line[b"staleness"]) == int(line[b"version"]) - 1


def check_losses(redis_url: str, red: Path, blue: Path) -> None:
    """Each expert knows its own rows better than the base and than the other expert does."""
    files = ("--data", f"red={red}", "--data", f"blue={blue}")
    done = fedmoe("evaluate", "--redis", redis_url, *files, "--rows", "10", "--json", "-")
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)["loss"]
    for mine, other in (("red", "blue"), ("blue", "red")):
        assert losses[mine][mine] < losses["base"][mine] - 0.2, (
            losses
        )  # the head is frozen: 4.3 is the least possible
        assert losses[mine][mine] < losses[other][mine], losses


IDS = torch.tensor([[5, 9, 77, 30, 200, 4]])


def logits_with(weights: dict[str, torch.Tensor], base: Path) -> torch.Tensor:
    """Logits of the base with ΔW added by hand to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = model.state_dict()
    for module, delta in weights.items():
        state[f"{module}.weight"] += delta
    model.load_state_dict(state)
    with torch.no_grad():
        return model(IDS).logits


def products(spec: Spec, file: bytes) -> dict[str, torch.Tensor]:
    """(alpha / rank) · B A of every module of an adapter."""
    buffer = AdapterBuffer(spec.layout)
    buffer.load(file)
    tensors = spec.layout.views(buffer.flat)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): spec.lora.scaling
        * tensors[name.replace("lora_A", "lora_B")]
        @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def exported_logits(directory: Path, base: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(directory))(IDS).logits


def check_expert_logits(directory: Path, spec: Spec, file: bytes, base: Path) -> None:
    """Peft loads the exported expert, and it is base + (alpha/r) B A."""
    expected = logits_with(products(spec, file), base)
    torch.testing.assert_close(exported_logits(directory, base), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits_with({}, base), atol=1e-3)


def check_gateway_logits(directory: Path, store: GatewayStore, base: Path) -> None:
    """Peft loads the exported gateway, and it is base + the mean of the experts' products."""
    parts = [products(store.spec(name), store.read(name)[1]) for name in ("red", "blue")]
    mean = {module: sum(part[module] for part in parts) / 2 for module in parts[0]}
    torch.testing.assert_close(
        exported_logits(directory, base), logits_with(mean, base), rtol=1e-4, atol=1e-5
    )
    info = json.loads((directory / "fedmoe.json").read_text())
    assert "red" in json.dumps(info)
