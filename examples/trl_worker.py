"""TRL's SFTTrainer as a worker: python examples/trl_worker.py --data rows.jsonl --base-model DIR_OR_HUB_ID."""

import click
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import fedmoe
from fedmoe.integrations.transformers import FedMoECallback


@click.command()
@click.option(
    "--redis", default="redis://127.0.0.1:6379/0", envvar="FEDMOE_REDIS", help="URL of the federation."
)
@click.option("--data", required=True, help="JSONL file; never leaves this machine.")
@click.option("--expert", default="sql_expert", help="Expert to train.")
@click.option("--base-model", required=True, help="The expert's base model: hub id or directory.")
@click.option("--name", default="trl", help="This worker's name.")
@click.option("--steps", default=100, help="Optimizer steps.")
def main(redis: str, data: str, expert: str, base_model: str, name: str, steps: int) -> None:
    """Train an expert with SFTTrainer."""
    trainer = SFTTrainer(
        model=base_model,
        args=SFTConfig(
            output_dir="trl-output", max_steps=steps, save_strategy="no", bf16=False, use_cpu=True
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        peft_config=fedmoe.connect(redis).expert(expert).lora_config(),
        callbacks=[FedMoECallback(redis, expert, name=name, state_dir=f"fedmoe-state-{name}")],
    )
    trainer.train()


try:
    main()
except fedmoe.FedMoEError as error:
    click.echo(error, err=True)
    raise SystemExit(error.exit_code) from None
