"""What makes a base model the expert's: pinned once, by whoever has it first, and compared with everybody else's."""

from dataclasses import replace

import pytest

from fedmoe.protocol.beat import Beat
from fedmoe.protocol.identity import BaseIdentity, expert_template, tokenizer_text
from fedmoe.protocol.records import Meta
from fedmoe.util.template_file import MAX_TEMPLATE_CHARS, template_digest
from tests.federation import first_meta, small_spec

SPEC = small_spec()
FRESH = first_meta(SPEC, base_fingerprint="")


def beaten(identity: BaseIdentity, meta: Meta | None = None) -> BaseIdentity:
    """The identity as the aggregator reads it out of a heartbeat."""
    return BaseIdentity.from_beat(Beat(**identity.beat_fields(meta)))


COMPONENTS = {"template": "0a", "added": "1a", "special": "2a", "vocabulary": "259-3a"}


def of(fingerprint: str = "aaaa", **components: str) -> BaseIdentity:
    """A base model whose tokenizer differs in these components."""
    return BaseIdentity(fingerprint=fingerprint, tokenizer=tokenizer_text(COMPONENTS | components))


def test_each_piece_is_pinned_once() -> None:
    """By the first who has it; the other components by whoever has those."""
    weights = BaseIdentity(fingerprint="aaaa")
    meta = beaten(weights).pin(FRESH, "aggregator")
    assert (meta.base_fingerprint, meta.base_fingerprint_by, meta.tokenizer) == ("aaaa", "aggregator", "")
    assert weights.is_pinned(meta)
    without = BaseIdentity(fingerprint="aaaa", tokenizer="added:1a special:2a vocabulary:259-3a")
    assert not without.is_pinned(meta)
    meta = beaten(without).pin(meta, "worker alice")
    assert (meta.tokenizer, meta.tokenizer_by) == (without.tokenizer, "worker alice")
    assert not of().is_pinned(meta)
    meta = beaten(of()).pin(meta, "worker bob")
    assert (meta.tokenizer, meta.tokenizer_by) == (of().tokenizer, "worker alice and worker bob")
    assert of().is_pinned(meta)
    other = of("bbbb", template="ff", vocabulary="9-9")
    assert beaten(other).pin(meta, "worker carol") == meta


def test_the_text_of_a_template_is_pinned_with_its_digest() -> None:
    """Whoever pins the digest brings the text, also later; another text never comes to it."""
    text, digest = "{{ messages }}", template_digest("{{ messages }}")
    mine = replace(of(template=digest), chat_template=text)
    for meta in (FRESH, of(template=digest).pin(FRESH, "aggregator")):
        assert mine.beat_fields(meta)["chat_template"] == text
        pinned = beaten(mine, meta).pin(meta, "worker alice")
        assert pinned.chat_template == text
        assert "chat_template" not in mine.beat_fields(pinned)
    other = of().pin(FRESH, "aggregator")
    assert beaten(mine).pin(other, "worker alice") == other


def test_what_differs_is_named() -> None:
    """Other weights, each component of a tokenizer, two at once; nothing that is not pinned, or that nobody knows."""
    meta = replace(of().pin(FRESH, "worker alice"), base_model="org/tiny")
    assert of().difference(meta) == of("bbbb", template="f").difference(FRESH) == ""
    assert BaseIdentity(fingerprint="aaaa").difference(meta) == ""
    assert "bbbb, the expert's have aaaa (set by worker alice): use exactly org/tiny" in of(
        "bbbb"
    ).difference(meta)
    for name, words in (
        ("template", "in chat template: use the tokenizer and the chat template that org/tiny"),
        ("added", "in added tokens: use"),
        ("special", "in special token ids (bos, eos, pad): use"),
        ("vocabulary", "in vocabulary: use"),
    ):
        told = of(**{name: "ff"}).difference(meta)
        assert told.startswith(f"its tokenizer differs from the expert's (set by worker alice) {words}")
    assert "in chat template and special token ids" in of(template="f", special="f").difference(meta)
    brought = replace(of(template="ff"), chat_template="{{ mine }}")
    assert brought.difference(meta).endswith("in chat template: start the worker without --chat-template")
    assert of().refusal(meta, "sql_expert") == ""
    assert "does not match expert 'sql_expert': its weights" in of("b").refusal(meta, "sql_expert")


@pytest.mark.parametrize("text", ["\x00", "template", "added:" + "f" * 99, "who:1 added:F", "a" * 10**6])
def test_what_is_no_fingerprint_is_no_ones(text: str) -> None:
    """Anybody may write a heartbeat or a header: it pins nothing, and differs from everything that is pinned."""
    odd = BaseIdentity(fingerprint="aaaa", tokenizer=text)
    meta = of().pin(FRESH, "aggregator")
    assert odd.pin(FRESH, "worker mallory").tokenizer == ""
    assert odd.pin(meta, "worker mallory") == meta
    assert "and vocabulary" in odd.difference(meta)


def test_nothing_that_a_heartbeat_holds_grows_the_meta_without_bound() -> None:
    """Anybody may write a heartbeat."""
    text = "t" * (MAX_TEMPLATE_CHARS + 1)
    long = replace(of("f" * 10**6, template=template_digest(text)), chat_template=text)
    meta = long.pin(FRESH, "worker mallory")
    assert (len(meta.base_fingerprint), meta.chat_template) == (64, "")


def test_the_spec_comes_before_the_meta() -> None:
    """A template that the operator gave is not replaced by a worker's."""
    meta = replace(FRESH, chat_template="{{ worker }}")
    assert expert_template(SPEC, meta) == "{{ worker }}"
    assert expert_template(replace(SPEC, chat_template="{{ operator }}"), meta) == "{{ operator }}"
    assert expert_template(SPEC, FRESH) == ""
