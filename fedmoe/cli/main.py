"""`fedmoe`: the root command, its configuration file, and errors as one sentence."""

import importlib
import io
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import click

from fedmoe import __version__
from fedmoe.cli.config import read_config
from fedmoe.errors import FedMoEError
from fedmoe.util.text import printable_lines

# name -> (module, attribute, help); a module is imported only when its command is used.
COMMANDS = {
    "aggregator": ("fedmoe.cli.aggregator", "aggregator", "Apply the updates of the workers to the experts."),
    "worker": ("fedmoe.cli.worker", "worker", "Fine-tune an expert on private data."),
    "status": ("fedmoe.cli.status", "status", "Show experts, workers and waiting updates."),
    "dashboard": ("fedmoe.cli.dashboard", "dashboard", "Show the federation in a browser, and as JSON."),
    "expert": ("fedmoe.cli.expert", "expert", "List, show, change, add, remove and roll back experts."),
    "gateway": ("fedmoe.cli.gateway", "gateway", "Export the model that knows all domains."),
    "evaluate": ("fedmoe.cli.evaluate", "evaluate", "Held-out loss of base, experts and gateway."),
    "verify": ("fedmoe.cli.verify", "verify", "Recompute experts from their logs, and compare."),
    "backup": ("fedmoe.cli.backup", "backup", "Write all experts to a directory, also while they train."),
    "restore": ("fedmoe.cli.backup", "restore", "Put the experts of a backup into a Redis."),
    "demo": ("fedmoe.cli.demo", "demo", "Train and merge three experts on this machine, with a real model."),
    "config": ("fedmoe.cli.config", "config", "Show settings and their sources, check a configuration file."),
    "doctor": ("fedmoe.cli.doctor", "doctor", "Check this installation and the Redis."),
}


class SafeFormatter(logging.Formatter):
    """Lines such as `2026-01-31T12:00:00Z INFO sql_expert: serving from version 3`.

    Text of others is escaped, so that no worker can send escape sequences to the operator's terminal.
    """

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = printable_lines(record.message)
        return super().formatMessage(record)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that `fedmoe --help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedmoe")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="FEDMOE_CONFIG",
    help="TOML file with defaults, in sections like [aggregator.run]; redis and prefix at its top apply to all.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log debug messages, too.")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, verbose: bool) -> None:
    """FedMoE: teams fine-tune one language model together over nothing but a Redis; each domain is an expert.

    Every option can also be given by environment variable (shown by --help) or in the --config file; the command
    line wins over the environment, the environment over the file.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    for name in ("transformers", "httpx", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if config is not None:
        ctx.default_map = read_config(config, ctx)


def main() -> None:
    """Entry point: run the command; an error is printed as one sentence, not as a traceback."""
    warnings.filterwarnings("ignore", module="transformers")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack ×, Σ or the letters of a name
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = cli.main(standalone_mode=False, auto_envvar_prefix="FEDMOE")
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except FedMoEError as error:
        click.echo(f"fedmoe: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has ended; Python would print a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        click.echo(
            f"fedmoe: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}", err=True
        )
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # stdout may be on the disk that is full
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("fedmoe: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
