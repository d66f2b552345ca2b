"""What makes a base model the expert's: pinned once, by whoever has it first, and compared with everybody else's."""

from dataclasses import replace

from fedmoe.identity import BEAT_FIELDS, BaseIdentity, expert_template
from fedmoe.records import Meta
from fedmoe.template_file import MAX_TEMPLATE_CHARS
from tests.federation import first_meta, small_spec

SPEC = small_spec()
FRESH = first_meta(SPEC, base_fingerprint="")


def beaten(base: BaseIdentity, meta: Meta | None = None) -> BaseIdentity:
    """The identity as the aggregator reads it out of a heartbeat."""
    fields = base.beat_fields(meta)
    return BaseIdentity.from_beat({name: fields.get(name, "") for name in BEAT_FIELDS})


def test_each_piece_is_pinned_once() -> None:
    """By the first who has it; the other pieces by whoever has those."""
    alice = BaseIdentity(fingerprint="aaaa")
    meta = beaten(alice).pin(FRESH, "worker alice")
    assert (meta.base_fingerprint, meta.base_fingerprint_by, meta.chat_template) == (
        "aaaa",
        "worker alice",
        "",
    )
    assert alice.is_pinned(meta)
    bob = BaseIdentity(fingerprint="bbbb", chat_template="{{ messages }}")
    assert not bob.is_pinned(meta)
    both = beaten(bob, meta).pin(meta, "worker bob")
    assert both == replace(meta, chat_template="{{ messages }}", loss=both.loss)
    assert bob.is_pinned(both)
    assert "chat_template" not in bob.beat_fields(both)


def test_what_differs_is_named() -> None:
    """Other weights, another template; nothing that is not pinned, or that this party does not bring."""
    meta = replace(FRESH, base_fingerprint="aaaa", base_fingerprint_by="aggregator", base_model="org/tiny")
    assert BaseIdentity(fingerprint="x").difference(FRESH) == ""
    assert "is bbbb, the expert's is aaaa (pinned by aggregator): use org/tiny" in BaseIdentity(
        fingerprint="bbbb"
    ).difference(meta)
    pinned = replace(meta, chat_template="{{ a }}")
    assert BaseIdentity(fingerprint="aaaa").difference(pinned) == ""
    assert BaseIdentity(fingerprint="aaaa", chat_template="{{ a }}").difference(pinned) == ""
    other = BaseIdentity(fingerprint="aaaa", chat_template="{{ b }}")
    assert other.difference(meta) == ""
    assert other.difference(pinned).startswith("its chat template is ")


def test_nothing_that_a_heartbeat_holds_grows_the_meta_without_bound() -> None:
    """Anybody may write a heartbeat."""
    long = BaseIdentity(fingerprint="f" * 10**6, chat_template="t" * (MAX_TEMPLATE_CHARS + 1))
    meta = long.pin(FRESH, "worker mallory")
    assert (len(meta.base_fingerprint), meta.chat_template) == (64, "")


def test_the_spec_comes_before_the_meta() -> None:
    """A template that the operator gave is not replaced by a worker's."""
    meta = replace(FRESH, chat_template="{{ worker }}")
    assert expert_template(SPEC, meta) == "{{ worker }}"
    assert expert_template(replace(SPEC, chat_template="{{ operator }}"), meta) == "{{ operator }}"
    assert expert_template(SPEC, FRESH) == ""


def test_a_meta_of_before_is_read() -> None:
    """What an earlier FedMoE wrote has no template; any other field that lacks is an error, as before."""
    raw = {key.encode(): value.encode() for key, value in FRESH.to_hash().items()}
    del raw[b"chat_template"]
    assert Meta.from_hash(raw).to_hash() == FRESH.to_hash()
