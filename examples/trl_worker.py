"""TRL's SFTTrainer as a worker, beside any other workers of the same expert.

    python examples/trl_worker.py --data rows.jsonl --expert sql_expert --base-model DIR_OR_HUB_ID

Rows are what SFTTrainer takes: {"prompt", "completion"}, {"messages": […]} or {"text"}.
"""

import os

import click
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import fedmoe
from fedmoe.integrations.transformers import FedMoECallback


@click.command()
@click.option("--data", required=True, help="JSONL file; never leaves this machine.")
@click.option("--expert", default="sql_expert", show_default=True, help="Expert to train.")
@click.option("--base-model", required=True, help="The expert's base model: hub id or directory.")
@click.option("--name", default="", help="This worker's name.  [default: the host's]")
@click.option("--steps", default=100, show_default=True, help="Optimizer steps.")
def main(data: str, expert: str, base_model: str, name: str, steps: int) -> None:
    """Train an expert with SFTTrainer."""
    redis = os.environ.get("FEDMOE_REDIS", "redis://127.0.0.1:6379/0")
    trainer = SFTTrainer(
        model=base_model,
        args=SFTConfig(
            output_dir="trl-output", max_steps=steps, save_strategy="no", bf16=False, use_cpu=True
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        peft_config=fedmoe.connect(redis).expert(expert).lora_config(),
        callbacks=[FedMoECallback(redis, expert, name=name, state_dir=f"fedmoe-state-{name or 'trl'}")],
    )
    trainer.train()


main()
