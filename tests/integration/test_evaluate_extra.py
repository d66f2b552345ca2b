"""`fedmoe evaluate --adapter` with adapters that it cannot measure, and `--json` into pipes and through links."""

import json
import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from fedmoe.errors import SettingsError, SpecError
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_expert
from fedmoe.tools.export_files import write
from fedmoe.tools.heldout import read_directory
from tests.errors import raises
from tests.integration.test_evaluate_cli import run
from tests.processes import fedmoe_here
from tests.tiny import tiny_model
from tests.tiny_federation import make_federation, write_rows

pytestmark = pytest.mark.one_server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory of rows of red and blue."""
    (directory := tmp_path / "data").mkdir()
    for name in ("red", "blue"):
        write_rows(directory / f"{name}.jsonl", name, 6)
    return directory


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("use_dora", True), ("bias", "all"),
        ("modules_to_save", ["lm_head"]), ("layer_replication", [[0, 2], [1, 2]]),
    ],
)  # fmt: skip
def test_an_adapter_that_changes_more_than_two_factors_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    """Loaded as plain LoRA, it would be another model than the one that was trained."""
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with raises(SettingsError, about=field):
        read_directory(tmp_path)


def test_an_adapter_of_another_type_is_refused_before_the_rows_are_computed(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A field of another type, as a hand-written file may have."""
    make_federation(connection, tiny_model_dir)
    write(tmp_path / "odd", read_expert(GatewayStore(connection), "red"))
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": "4"}))
    said: list[str] = []
    with raises(SpecError, about="base_model"):
        run(connection, str(data), said=said, extra={"odd": tmp_path / "odd"})
    assert not any("evaluating" in line for line in said)


def test_json_goes_into_a_pipe_and_through_a_link(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """As `--json >(jq .)` of a shell gives it; a link stays one."""
    make_federation(connection, tiny_model_dir)
    (tmp_path / "real").mkdir()
    (link := tmp_path / "link.json").symlink_to(Path("real", "loss.json"))
    (tmp_path / "real" / "loss.json").write_text("old")
    command = ("evaluate", "--redis", connection.settings.url, "--data", str(data), "--json")
    assert fedmoe_here(*command, str(link)).returncode == 0
    assert link.is_symlink()
    wanted = json.loads((tmp_path / "real" / "loss.json").read_text())["loss"]
    reading, writing = os.pipe()
    done = fedmoe_here(*command, f"/dev/fd/{writing}")
    assert done.returncode == 0, done.stderr
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.load(pipe)["loss"] == wanted
