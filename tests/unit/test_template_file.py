"""The chat template: from a file or the expert, tried before anything is loaded; never made up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedmoe.errors import SettingsError
from fedmoe.model.tokenizer import check_template, tokenizer_fingerprint, use_template
from fedmoe.protocol.identity import TOKENIZER_COMPONENTS, tokenizer_components
from fedmoe.protocol.spec import Spec
from fedmoe.util.template_file import MAX_TEMPLATE_CHARS, read_template, template_digest
from tests.errors import raises
from tests.federation import small_spec
from tests.tiny import CHAT_TEMPLATE, END, PAD, START, tiny_tokenizer


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    """Without the last line feed, which Jinja leaves out: saved by an editor, it is the same template."""
    path = tmp_path / "t.jinja"
    path.write_text(CHAT_TEMPLATE + "\n", encoding="utf-8-sig")
    assert read_template(path) == CHAT_TEMPLATE
    assert template_digest(CHAT_TEMPLATE) == template_digest(CHAT_TEMPLATE + "\n")
    assert template_digest("") == "none"


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (None, "file"),
        (b" \n", "chat_template"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"x" * (MAX_TEMPLATE_CHARS + 1), "length"),
    ],
    ids=["none", "empty", "bytes", "long"],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, about: str) -> None:
    """One sentence with the path."""
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with raises(SettingsError, about=about) as error:
        read_template(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("template", "about"),
    [
        ("{% for m in messages %}", "chat_template"),
        ("{{ raise_exception('no') }}", "chat_template"),
        ("{{ messages[0].content }}", "assistant"),
        ("hello", "user"),
    ],
)
def test_a_template_is_tried_first(template: str, about: str) -> None:
    """One that is broken, or that shows the model something else than the rows."""
    check_template(CHAT_TEMPLATE)
    check_template(
        "{{ bos_token + messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}"
    )
    with raises(SettingsError, about=about):
        check_template(template)


def test_the_fingerprint_of_a_tokenizer_says_which_piece_is_another() -> None:
    """The same tokenizer gives the same text, however it came; each change changes its own component."""
    before = tokenizer_components(tokenizer_fingerprint(tiny_tokenizer()))
    assert before.keys() == TOKENIZER_COMPONENTS.keys()
    assert before["template"] == template_digest(CHAT_TEMPLATE)

    def changed(change: Callable[[PreTrainedTokenizerBase], object]) -> set[str]:
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        now = tokenizer_components(tokenizer_fingerprint(tokenizer))
        return {name for name in TOKENIZER_COMPONENTS if now.get(name) != before[name]}

    assert changed(lambda _: None) == set()
    assert changed(lambda t: setattr(t, "chat_template", None)) == {"template"}
    assert changed(lambda t: setattr(t, "chat_template", {"default": CHAT_TEMPLATE})) == {"template"}
    assert changed(lambda t: setattr(t, "pad_token", END)) == {"special"}
    assert changed(lambda t: t.add_tokens(["<new>"])) == {"added", "vocabulary"}
    core = tiny_tokenizer().backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    other = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, extra_special_tokens=[START]
    )
    other.chat_template = CHAT_TEMPLATE
    now = tokenizer_components(tokenizer_fingerprint(other))
    assert {name for name in now if now[name] != before[name]} == {"vocabulary"}


def test_whose_template_it_is() -> None:
    """The expert's, else the worker's, else the base model's own; with none nothing is trained."""
    mine = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def used(own_of_base: str | None, *, expert: str = "", worker: str = "") -> object:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = own_of_base
        use_template(
            tokenizer, expert="sql_expert", expert_template=expert, own=worker, base_model="org/tiny"
        )
        return tokenizer.chat_template

    assert used(CHAT_TEMPLATE) == CHAT_TEMPLATE
    assert used(CHAT_TEMPLATE, expert=mine) == mine
    assert used(None, worker=mine) == mine
    assert used(None, expert=mine, worker=mine) == mine
    with raises(SettingsError, about="chat_template"):
        used(None)
    with raises(SettingsError, about="template"):
        used(None, expert=mine, worker=CHAT_TEMPLATE)


def test_the_spec_of_before_keeps_its_digest() -> None:
    """A spec without a template is written as before; one with a template comes back whole."""
    plain = small_spec()
    assert "chat_template" not in plain.to_json()
    with_template = replace(plain, chat_template=CHAT_TEMPLATE)
    assert Spec.from_json(with_template.to_json()) == with_template
    assert with_template.digest != plain.digest
    with raises(SettingsError, about="chat_template"):
        replace(plain, chat_template="x" * (MAX_TEMPLATE_CHARS + 1))
