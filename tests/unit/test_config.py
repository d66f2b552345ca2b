"""`fedmoe config`, the file that it checks, and the page that lists every setting."""

import math
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import fedmoe.cli as fedmoe_cli
from consumers.gateway import methods
from fedmoe.cli.declared import key, made
from fedmoe.cli.main import cli
from fedmoe.cli.page import page
from fedmoe.errors import SettingsError
from fedmoe.protocol.formats import FORMATS
from fedmoe.protocol.lora import WIRE_FORMATS
from fedmoe.settings import METHODS, AggregatorSettings, GatewaySettings, WorkerSettings
from fedmoe.util.setting import declared
from tests.errors import raises

PAGE = Path(__file__).parent.parent.parent / "docs" / "settings.md"


def fedmoe(*words: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, words, auto_envvar_prefix="FEDMOE")


def test_page_lists_every_setting_as_it_is() -> None:
    """After a change of an option: `python -m fedmoe.cli.page > docs/settings.md`."""
    assert PAGE.read_text() == page()


def test_show_tells_where_a_value_comes_from(tmp_path: Path) -> None:
    """The environment goes before the file, the file before the default; a password is not shown."""
    file = tmp_path / "fedmoe.toml"
    file.write_text("redis = 'redis://me:secret@host:1'\n[worker.run]\ndrain = 7\nmax-steps = 3\n")
    done = fedmoe("--config", str(file), "config", "show", "worker", "run", FEDMOE_WORKER_RUN_DRAIN="9")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "[worker.run]"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert rows["redis"] == "redis://host:1 configuration file"
    assert rows["drain"] == "9 environment FEDMOE_WORKER_RUN_DRAIN"
    assert rows["max_steps"] == "3 configuration file"
    assert rows["batch_size"] == "as the rules say default"
    assert "secret" not in done.output


def test_variable_that_is_set_is_named() -> None:
    """Of the two that a shared setting has."""
    text = fedmoe("config", "show", "status", FEDMOE_STATUS_REDIS="redis://x:1").output
    assert "redis://x:1" in text
    assert "environment FEDMOE_STATUS_REDIS" in text


def test_show_has_every_command() -> None:
    """And says if there is none of that name."""
    text = fedmoe("config", "show").output
    for section in ("[aggregator.run]", "[worker.run]", "[expert.set]", "[status]"):
        assert section in text
    done = fedmoe("config", "show", "agregator")
    assert isinstance(done.exception, SettingsError)
    assert str(done.exception) == "there is no command 'agregator': see `fedmoe --help`"


def test_value_of_the_environment_that_is_no_number_is_a_sentence() -> None:
    """When it is shown, as when it is used."""
    done = fedmoe("config", "show", "worker", "run", FEDMOE_WORKER_RUN_DRAIN="soon")
    assert done.exit_code == 2
    assert "'soon' is not a valid float" in done.output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[aggregator.run]\nrank = 4.5", r"\[aggregator\] \[run\]: rank must be a whole number, not 4.5$"),
        ("[aggregator.run]\nrank = true", r"rank must be a whole number, not True$"),
        ("[aggregator.run]\nrank = '4'", r"rank must be a whole number, not '4'$"),
        ("[aggregator.run]\nlr = true", r"lr must be a number, not True$"),
        ("[aggregator.run]\nmax-staleness = true", r"max_staleness must be a number or a word, not True$"),
        (
            "[aggregator.run]\nmax-staleness = 'some'",
            r"max_staleness: 'some' must be a whole number, or auto$",
        ),
        ("[aggregator.run]\ndecay = 'linear'", r"decay: 'linear' is not one of"),
        ("[aggregator.run]\nburst = 1", r"burst must be true or false, not 1$"),
        ("[aggregator.run]\nexpert = 'a'", r"expert must be a list, like \['a'\], not 'a'$"),
        ("[aggregator.run]\nkeep-updates = 3", r"keep_updates must be a text in quotes, not 3$"),
        ("[aggregator]\nrank = 4", r"there is no command for the section or key 'rank'$"),
        ("aggregator = 4", r"unknown key 'aggregator'"),
        ("[aggregator]\nrun = 4", r"'run' is a command: its settings are a section of their own$"),
        ("redis = ['redis://u:secret@h']", r"redis must be a text in quotes$"),
        ("[status]\nredis = ['redis://u:secret@h']", r"redis must be a text in quotes$"),
        ("[aggregator.run]\nmax-staleness = inf", r"max_staleness: inf must be a whole number, or auto$"),
        ("[aggregator.run]\nmax-staleness = 2.7", r"max_staleness: 2.7 must be a whole number, or auto$"),
        ("[aggregator.run]\nlr = 1" + 400 * "0", r"lr is a number that is too large$"),
        ("[aggregator.run]\nrank = 1" + 5000 * "0", r"is not TOML: Exceeds the limit"),
        ("x = " + 3000 * "[", r"is not TOML: "),
        ("[worker.run]\ndata = ''", r"data must not be empty$"),
        ("[worker.run]\nno-wait = true\nno_wait = false", r"a key appears twice, with - and with _$"),
        ("[expert.set]\nname = 'a'", r"unknown key 'name'"),
    ],
)
def test_mistakes_of_names_and_types_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    """Click would take true for 1, and 2.7 for 2; also when the file is used."""
    file = tmp_path / "fedmoe.toml"
    file.write_text(text)
    for words in (("config", "check", str(file)), ("--config", str(file), "config", "show")):
        done = fedmoe(*words)
        assert isinstance(done.exception, SettingsError), done.output
        with pytest.raises(SettingsError, match=sentence):
            raise done.exception


def test_file_that_is_right_passes_and_is_used(tmp_path: Path) -> None:
    """Both spellings of a name, whole numbers where any number may be, lists, words."""
    file = tmp_path / "fedmoe.toml"
    file.write_text(
        "redis = 'redis://h'\nprefix = 'p'\n[aggregator.run]\nlr = 1\nsync-interval = 30\nmax_staleness = 'auto'\n"
        "expert = ['a', 'b=2']\nburst = true\nkeep-updates-for = '7d'\n[worker.run]\nstream = 'a'\n"
    )
    done = fedmoe("config", "check", str(file))
    assert done.output == f"{file}: all names and types are right\n"
    text = fedmoe("--config", str(file), "config", "show", "aggregator", "run").output
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert rows["expert"] == "a b=2 configuration file"
    assert rows["sync_interval"] == "30 configuration file"
    assert rows["keep_updates_for"] == "7d configuration file"


def test_every_method_of_the_merge_can_be_chosen() -> None:
    """The settings know no torch, so they name the methods, and that which takes a rank."""
    assert tuple(methods.METHODS) == METHODS
    for name, method in methods.METHODS.items():
        takes_rank = method.rank is methods.Rank.CHOSEN
        with nullcontext() if takes_rank else raises(SettingsError, about="gateway_rank"):
            GatewaySettings(method=name, rank=3)


def test_wire_formats_are_those_of_the_codec() -> None:
    """The settings name them without importing torch."""
    assert tuple(FORMATS) == WIRE_FORMATS


def test_settings_and_commands_import_nothing_heavy() -> None:
    """Whoever only asks for help or shows settings waits for no torch."""
    modules = [f"fedmoe.cli.{module.name}" for module in pkgutil.iter_modules(fedmoe_cli.__path__)]
    assert "fedmoe.cli.worker" in modules
    code = f"import sys, fedmoe.settings, fedmoe.protocol.rules, {', '.join(modules)}; "
    code += "print([n for n in ('torch', 'redis', 'transformers', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "bad", "sentence"),
    [
        (
            AggregatorSettings,
            {"lease_s": 0.1},
            r"^lease must be a number of at least 0.2 and at most 86,400 ",
        ),
        (
            AggregatorSettings,
            {"batch": 0},
            "^batch must be a whole number of at least 1 and at most 1,024 .updates., not 0$",
        ),
        (AggregatorSettings, {"block_ms": 400, "lease_s": 0.5}, "must be at most half the lease"),
        (AggregatorSettings, {"keep_updates_for_s": 60.0}, "--keep-updates-for needs --keep-updates"),
        (
            GatewaySettings,
            {"method": "mean"},
            "^gateway_method must be one of cat, svd, .*, not 'mean'$",
        ),
        (GatewaySettings, {"scale": math.inf}, "^gateway_scale must be a number above 0, not inf$"),
        (GatewaySettings, {"rank": 4}, "gateway_rank is for the method svd only"),
        (
            WorkerSettings,
            {"drain_s": math.nan},
            r"^drain must be a number of at least 0 \(seconds\), not nan$",
        ),
        (WorkerSettings, {"precision": "fp8"}, "^precision must be one of auto, fp32, bf16, not 'fp8'$"),
        (WorkerSettings, {"name": "a:b"}, "worker name 'a:b' cannot be used"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence(kind: Any, bad: dict[str, Any], sentence: str) -> None:
    """With the option's name, its bound, its unit and what came."""
    needed = {"stream": "a", "data": Path("x")} if kind is WorkerSettings else {}
    with pytest.raises(SettingsError, match=sentence):
        kind(**needed, **bad)


def test_options_make_the_settings() -> None:
    """Those that are given, negated flags among them; the others are the class's."""
    values = {key(one): None for one in declared(WorkerSettings)}
    values |= {"stream": "a", "data": Path("x"), "drain": 3.0, "no_wait": True}
    made_of = made(WorkerSettings, values)
    assert made_of == WorkerSettings(stream="a", data=Path("x"), drain_s=3.0, wait=False)
