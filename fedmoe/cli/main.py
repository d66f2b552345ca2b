"""`fedmoe`: the root command, its configuration file, and errors as one sentence."""

import importlib
import io
import os
import sys
import warnings
from pathlib import Path

import click

from fedmoe import __version__
from fedmoe.cli.config import read_config
from fedmoe.errors import FedMoEError
from fedmoe.util.log import complain, is_json, logger, start_log

# name -> (module, attribute, help); a module is imported only when its command is used.
COMMANDS = {
    "init": ("fedmoe.cli.init", "init", "Write what the machines of a new federation need."),
    "aggregator": ("fedmoe.cli.aggregator", "aggregator", "Apply the updates of the workers to the experts."),
    "worker": ("fedmoe.cli.worker", "worker", "Fine-tune an expert on private data."),
    "status": ("fedmoe.cli.status", "status", "Show experts, workers and waiting updates."),
    "top": ("fedmoe.cli.top", "top", "Show all of it on a full screen that scrolls, sorts and filters."),
    "metrics": ("fedmoe.cli.metrics", "metrics", "Serve the state of the federation for Prometheus."),
    "monitor": ("fedmoe.cli.enrol", "monitor", "Enrol and revoke monitors, who read the status."),
    "operator": ("fedmoe.cli.enrol", "operator", "Enrol and revoke operators, and read the audit log."),
    "dashboard": ("fedmoe.cli.dashboard", "dashboard", "Show the federation in a browser, and as JSON."),
    "expert": ("fedmoe.cli.expert", "expert", "List, show, change, add, remove and roll back experts."),
    "gateway": ("fedmoe.cli.gateway", "gateway", "Export the model that knows all domains."),
    "evaluate": ("fedmoe.cli.evaluate", "evaluate", "Held-out loss of base, experts and gateway."),
    "verify": ("fedmoe.cli.verify", "verify", "Recompute experts from their logs, and compare."),
    "backup": ("fedmoe.cli.backup", "backup", "Write all experts to a directory, also while they train."),
    "restore": ("fedmoe.cli.backup", "restore", "Put the experts of a backup into a Redis."),
    "plan": ("fedmoe.cli.plan", "plan", "Estimate memory, disk and network of a federation."),
    "demo": (
        "fedmoe.cli.demo",
        "demo",
        "Train three experts and a gateway on this machine, with a real model.",
    ),
    "config": ("fedmoe.cli.config", "config", "Show settings and their sources, check a configuration file."),
    "healthy": ("fedmoe.cli.healthy", "healthy", "Say whether a process of this machine is alive."),
    "doctor": ("fedmoe.cli.doctor", "doctor", "Check this installation and the Redis."),
}


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
    help="TOML file with defaults, in sections like [aggregator.run]; redis, prefix, enrolment at its top are for all.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log debug messages, too.")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, verbose: bool) -> None:
    """FedMoE: teams fine-tune one language model together over nothing but a Redis; each domain is an expert.

    Every option can also be given by environment variable (shown by --help) or in the --config file; the command
    line wins over the environment, the environment over the file.
    """
    start_log("debug" if verbose else "info")
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
        if is_json():
            complain(error.format_message())
        else:
            error.show()
        sys.exit(error.exit_code)
    except FedMoEError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has ended; Python would print a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        complain(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # stdout may be on the disk that is full
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        sys.exit(130)
    except Exception:
        if not is_json():
            raise
        logger.critical("unexpected error", exc_info=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
