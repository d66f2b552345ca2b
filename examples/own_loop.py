"""A training loop of your own as a worker: join, call `step` after each optimizer step, leave.

    python examples/own_loop.py --data rows.jsonl --expert sql_expert

The rows here are {"text": …}, one per line; the loss is on every token.
"""

import json
import sys
from pathlib import Path

import click
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmoe


@click.command()
@click.option(
    "--redis", default="redis://127.0.0.1:6379/0", envvar="FEDMOE_REDIS", help="URL of the federation."
)
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSONL file; never leaves this machine."
)
@click.option("--expert", default="sql_expert", show_default=True, help="Expert to train.")
@click.option("--base-model", required=True, help="The expert's base model: hub id or directory.")
@click.option("--name", default="own", help="This worker's name.")
@click.option("--steps", default=100, show_default=True, help="Optimizer steps.")
def main(redis: str, data: Path, expert: str, base_model: str, name: str, steps: int) -> None:
    """Train an expert with a loop of your own."""
    rows = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    # The adapter must be the expert's own: same rank, same targets, same scaling.
    model = get_peft_model(base, fedmoe.connect(redis).expert(expert).lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    # From here on the adapter holds the expert's present weights; or those of the checkpoint, after a restart.
    with fedmoe.join(
        redis, {expert: model}, name=name, state_dir=f"fedmoe-state-{name}", optimizer=optimizer,
        tokenizer=tokenizer, data=str(data),
    ) as member:  # fmt: skip
        for _ in range(steps):
            row = rows[member.position % len(rows)]  # after a restart, the next row
            ids = tokenizer(row, return_tensors="pt", truncation=True, max_length=512).input_ids
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # The one call at each step boundary: it publishes when it is time to, and takes in what others learnt.
            member.step(n_examples=1, n_tokens=ids.numel() - 1, loss=loss.item())
    # The end of the block publishes what is left and waits up to 30 s for the aggregator's decision.
    print(f"{expert} is at version {member.status[expert].version}")


try:
    main()
except fedmoe.FedMoEError as error:
    click.echo(error, err=True)
    sys.exit(error.exit_code)
