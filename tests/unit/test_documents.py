"""README and docs: short, linked, rendered from the code where they can be, and true to the command line."""

import re
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fedmoe.cli.config import commands as settings
from fedmoe.cli.main import cli
from tests.documents import PAGES, ROOT, broken_link, links, mentions, misfit, name_of
from tests.hazards.page import page as hazards_page

# Of all commands, the benchmark, the chaos run and vLLM.
ELSEWHERE = {"--config", "--quick", "--only", "--without", "--max-lora-rank"}
EXAMPLE = ROOT / "examples" / "fedmoe.toml"


def test_readme_is_short() -> None:
    """A newcomer reads it to its end."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120


def test_readme_names_both_commands() -> None:
    """As lines that can be typed: continuous integration runs the same."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "bash ops/demo.sh" in lines
    assert "bash ops/test.sh" in lines


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file, and to a heading in it."""
    assert [wrong for target in links(page) if (wrong := broken_link(page, target))] == []


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to each page of its directory."""
    docs = ROOT / "docs"
    linked = {(docs / target.partition("#")[0]).resolve() for target in links(docs / "README.md")}
    assert {page for page in PAGES if page.parent == docs} <= linked | {docs / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Each `fedmoe …` that a page mentions is a command with these options; so are those of the demo's script."""
    for one in (*mentions(page, "fedmoe"), *mentions(page, "bash ops/demo.sh")):
        assert misfit(one.text.replace("bash ops/demo.sh", "fedmoe demo")) == "", one


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("fedmoe worker run --stream a", ""),
        ("fedmoe worker start", "there is no command start"),
        ("fedmoe worker run --streams a", "there is no option --streams"),
        ("X=1 fedmoe --config a.toml config show aggregator run", ""),
        ("fedmoe expert list | show | set", ""),
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str, wrong: str) -> None:
    """Else the test above would show nothing."""
    assert misfit(text) == wrong


def test_options_and_variables_exist() -> None:
    """Those that a sentence names alone, and the environment variables."""
    options, variables = set(ELSEWHERE), {"FEDMOE_CONFIG", "FEDMOE_RUN_DIR", "FEDMOE_NAME", "FEDMOE_DIR"}
    variables.add("FEDMOE_DASHBOARD_PASSWORD")  # a secret is no option
    for words, context in settings(click.Context(cli, info_name="fedmoe", auto_envvar_prefix="FEDMOE")):
        for option in context.command.params:
            options |= {*option.opts, *option.secondary_opts}
            variables |= {"_".join(("fedmoe", *words, str(option.name))).upper(), str(option.envvar)}
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"`(--[a-z][\w-]*)", text)) <= options, name_of(page)
        assert set(re.findall(r"FEDMOE_[A-Z_]*[A-Z]", text)) <= variables, name_of(page)


def test_page_of_hazards_is_that_of_the_table() -> None:
    """After a change of the table: `python -m tests.hazards.page > docs/hazards.md`."""
    assert (ROOT / "docs" / "hazards.md").read_text() == hazards_page()


def test_lines_are_short() -> None:
    """So that a page can be read as text; tables, links and what programs print may be longer."""
    for page in PAGES:
        for line in re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S).splitlines():
            assert len(line) <= 120 or line.lstrip().startswith("|"), f"{name_of(page)}: {line}"


def test_hooks_run_what_the_tests_run() -> None:
    """The linters of ops/test.sh, each at each commit; all from this repository's environment."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.+)", hooks) == ["local"]
    assert set(re.findall(r"language: (.+)", hooks)) == {"system"}
    entries = [
        re.sub(r"^bash -c '(.*)'$", r"\1", entry).removeprefix(".venv/bin/")
        for entry in re.findall(r"entry: (.+)", hooks)
    ]
    script = (ROOT / "ops" / "test.sh").read_text()
    assert entries == [line for line in re.findall(r"^run (.+)$", script, flags=re.M) if "pytest" not in line]


def check(file: Path) -> str:
    done = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert done.exit_code == 0, done.exception
    return done.output


def test_example_of_a_file_is_right(tmp_path: Path) -> None:
    """As it is, and with every setting that it names in a comment."""
    assert "all names and types are right" in check(EXAMPLE)
    text = EXAMPLE.read_text()
    all_of_it = tmp_path / "all.toml"
    all_of_it.write_text(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.M))
    check(all_of_it)
    assert tomllib.loads(all_of_it.read_text()).keys() >= {"redis", "prefix", "aggregator", "worker"}
