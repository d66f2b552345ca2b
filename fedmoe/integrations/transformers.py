"""A `transformers.Trainer`, and so TRL's `SFTTrainer`, as a worker.

    trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=…, callbacks=[FedMoECallback(url, "sql_expert")])
    trainer.train()

The callback joins when the training begins, reports each optimizer step, and leaves when the training ends.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import fedmoe
from fedmoe.errors import SettingsError
from fedmoe.settings import RedisSettings

logger = logging.getLogger(__name__)


class FedMoECallback(TrainerCallback):  # type: ignore[misc]  # checkers do not read transformers
    """Makes a Trainer a worker of one expert.

    Args:
        redis: URL of the federation's Redis, or its settings.
        expert: to train; the model must bear its adapter: `peft_config=connect(url).expert(name).lora_config()`.
        name, state_dir, drain_s, wait: see `fedmoe.join`.

    Attributes:
        member: of the current training; None before and after it.

    Raises:
        SettingsError: when the training begins, if the Trainer trains full weights or several adapters, runs in several
            processes, or would restore an older adapter at its end (load_best_model_at_end).
    """

    def __init__(
        self,
        redis: str | RedisSettings,
        expert: str,
        *,
        name: str = "",
        state_dir: str | Path | None = None,
        drain_s: float = 30.0,
        wait: bool = True,
    ) -> None:
        self.member: fedmoe.Member | None = None
        self._redis, self._expert = redis, expert
        self._options: dict[str, Any] = {
            "name": name,
            "state_dir": state_dir,
            "drain_s": drain_s,
            "wait": wait,
        }
        self._rows = self._tokens = 0
        self._loss = float("nan")
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Join: the adapter then holds the expert's present weights."""
        if self.member is not None:  # the training before failed
            logger.info("leaving the federation for the training before, which did not end")
            try:
                self._end(is_done=False)
            except fedmoe.FedMoEError as lost:
                logger.warning("%s", lost)
        self._rows, self._tokens, self._loss = 0, 0, float("nan")
        if args.load_best_model_at_end:
            raise SettingsError(
                "load_best_model_at_end would put an older adapter over what was published: set it to False",
                about="load_best_model_at_end",
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise SettingsError(
                "the training is spread over several devices: start one worker on each GPU (CUDA_VISIBLE_DEVICES=0), "
                "each with a name of its own",
                about="devices",
            )
        model: nn.Module = kwargs["model"]
        self.member = fedmoe.join(
            self._redis,
            {self._expert: model},
            optimizer=kwargs.get("optimizer"),
            tokenizer=kwargs.get("processing_class"),
            **self._options,
        )
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before each forward pass: count the rows and the labels of the current step."""
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if not model.training or ids is None:
            return
        positions = inputs.get("position_ids")
        # Without padding, all rows stand in one, and each begins at position 0.
        self._rows += int((positions == 0).sum()) if positions is not None and len(ids) == 1 else len(ids)
        self._tokens += int((labels[..., 1:] != -100).sum()) if labels is not None else ids.numel()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the step. Raises FedMoEError if this worker cannot go on."""
        assert self.member is not None
        rows = self._rows or args.train_batch_size * args.gradient_accumulation_steps
        tokens, self._rows, self._tokens = self._tokens, 0, 0
        self.member.step(n_examples=rows, n_tokens=tokens, loss=self._loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the loss that the Trainer logged last; `fedmoe status` shows it."""
        self._loss = float((logs or {}).get("loss", self._loss))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the rest, wait for the decision, and leave. Raises FedMoEError if steps are lost."""
        self._end(is_done=True)

    def leave(self) -> None:
        """Leave after a training that failed or was interrupted; after any other the callback has left by itself.

        Without this call it leaves when its next training begins, or when the program ends.
        """
        self._end(is_done=False)

    def _end(self, *, is_done: bool) -> None:
        if self._hook is not None:
            self._hook.remove()
        member, self.member, self._hook = self.member, None, None
        if member is not None:
            for name, sentence in member.leave(is_done=is_done).items():
                logger.info("%s: %s", name, sentence)
