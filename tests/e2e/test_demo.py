"""The demo from end to end, on a tiny model and two domains: the table that it promises, and the files."""

import json
from pathlib import Path

import pytest

from fedmoe.tools.share import format_table
from tests.e2e.test_training import write_rows
from tests.processes import fedmoe


@pytest.mark.timeout(300)
def test_demo_prints_and_writes_the_table_with_the_trained_and_the_merged_gateway(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Both gateways beside the experts and perfect routing; what is exported is the trained one."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("red", "blue"):
        write_rows(data / f"{name}.jsonl", f"what {name}", f"{name} {name}")
    done = fedmoe(
        "demo", "--model", str(tiny_model_dir), "--data", str(data), "--out", str(out), "--seconds", "3",
        "--rows", "4", timeout_s=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert list(results["share"]) == [
        "base", "blue", "red", "routed", "routed by domain vectors", "arrow", "gateway", "merged",
    ]  # fmt: skip
    loss, share = results["held_out_loss"], results["share"]
    assert share["routed"] == 1.0
    assert loss["gateway"]["mean"] < loss["base"]["mean"]
    assert format_table(loss, results["routed"], share) in done.stdout
    assert "--train both" in done.stdout
    assert {"red", "blue", "aggregator", "evaluate", "export"} == results["processes"].keys()
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list(json.loads((out / "gateway" / "fedmoe.json").read_text())["built_from"]) == ["gateway"]
