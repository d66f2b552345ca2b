"""Identity of a base model beyond its config: fingerprints of its weights and its tokenizer. Pure.

The first party that has a component pins it in the expert's meta: the aggregator when it creates the expert, else the
first worker, through its heartbeat. Every other party is compared with the pinned components.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedmoe.protocol.beat import Beat
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.util.template_file import MAX_TEMPLATE_CHARS, template_digest

MAX_FINGERPRINT_CHARS = 64
BEAT_FIELDS = ("base_fingerprint", "tokenizer", "chat_template")  # of a heartbeat
# The components of a tokenizer, in the order in which they are compared, with their names in messages.
TOKENIZER_COMPONENTS = {
    "template": "chat template",
    "added": "added tokens",
    "special": "special token ids (bos, eos, pad)",
    "vocabulary": "vocabulary",
}
_COMPONENT = re.compile(r"([a-z]{1,16}):([0-9a-z-]{1,32})")


def tokenizer_text(components: Mapping[str, str]) -> str:
    """A tokenizer's fingerprint, for example `template:0a1b2c3d added:… special:… vocabulary:…`."""
    return " ".join(f"{name}:{components[name]}" for name in TOKENIZER_COMPONENTS if name in components)


def tokenizer_components(text: str) -> dict[str, str]:
    """The components in an untrusted tokenizer fingerprint; unknown and malformed ones are left out."""
    found = (_COMPONENT.fullmatch(part) for part in text[:1024].split())
    return {match[1]: match[2] for match in found if match and match[1] in TOKENIZER_COMPONENTS}


def expert_template(spec: Spec, meta: Meta) -> str:
    """The expert's own chat template, "" if its base model's template is used."""
    return spec.chat_template or meta.chat_template


def base_difference(spec: Spec, meta: Meta, other_spec: Spec, other: Meta) -> str:
    """What differs between the base models of two experts; "" if nothing does, as far as both are known."""
    mine, theirs = spec.base_config, other_spec.base_config
    for name, value in mine.items():
        if theirs.get(name, value) != value:
            return f"{name} ({theirs[name]}, not {value})"
    if meta.base_fingerprint and other.base_fingerprint not in ("", meta.base_fingerprint):
        return f"its weights (fingerprint {other.base_fingerprint}, not {meta.base_fingerprint})"
    words, others = tokenizer_components(meta.tokenizer), tokenizer_components(other.tokenizer)
    for name, what in TOKENIZER_COMPONENTS.items():
        if name in words and others.get(name, words[name]) != words[name]:
            return f"its {what}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """The base model of one party.

    Args:
        fingerprint: of its weights.
        tokenizer: fingerprint of its tokenizer, with the template in use; "" if unknown. A training loop that formats
            and pads its rows itself names only the vocabulary; then nothing else is compared.
        chat_template: the worker's own template, "" if it uses the expert's or the base model's.
    """

    fingerprint: str
    tokenizer: str = ""
    chat_template: str = ""

    @classmethod
    def from_beat(cls, beat: Beat) -> "BaseIdentity":
        """The identity in an untrusted heartbeat."""
        return cls(
            fingerprint=beat.base_fingerprint, tokenizer=beat.tokenizer, chat_template=beat.chat_template
        )

    @classmethod
    def from_header(cls, header: Header) -> "BaseIdentity":
        """The identity in an update's header."""
        return cls(fingerprint=header.base_fingerprint, tokenizer=header.tokenizer)

    def beat_fields(self, meta: Meta | None = None) -> dict[str, Any]:
        """This identity as heartbeat fields; a template is left out if `meta` already holds one."""
        fields = {"base_fingerprint": self.fingerprint, "tokenizer": self.tokenizer}
        if self.chat_template and not (meta and meta.chat_template):
            fields["chat_template"] = self.chat_template
        return fields

    def is_pinned(self, meta: Meta) -> bool:
        """True if `meta` holds every component that this party could pin."""
        return (
            bool(meta.base_fingerprint)
            and tokenizer_components(self.tokenizer).keys() <= tokenizer_components(meta.tokenizer).keys()
        )

    def differing(self, meta: Meta) -> list[str]:
        """What differs from the identity pinned in `meta`: `fingerprint` alone, or components of the tokenizer."""
        if meta.base_fingerprint not in ("", self.fingerprint):
            return ["fingerprint"]
        if self.tokenizer in ("", meta.tokenizer):
            return []
        mine, pinned = tokenizer_components(self.tokenizer), tokenizer_components(meta.tokenizer)
        compared = [name for name in pinned if name in mine or "vocabulary" not in mine]
        return [name for name in TOKENIZER_COMPONENTS if name in compared and mine.get(name) != pinned[name]]

    def difference(self, meta: Meta) -> str:
        """How this identity differs from the one pinned in `meta`, as a clause with what to do; "" if it matches."""
        odd = self.differing(meta)
        if odd == ["fingerprint"]:
            return (
                f"its weights have fingerprint {self.fingerprint}, the expert's have {meta.base_fingerprint} (set by "
                f"{meta.base_fingerprint_by}): use exactly {meta.base_model}, no variant of it (Base, Instruct)"
            )
        if odd:
            what = " and ".join(TOKENIZER_COMPONENTS[name] for name in odd)
            remedy = f"use the tokenizer and the chat template that {meta.base_model} was published with"
            if odd == ["template"] and self.chat_template:
                remedy = "start the worker without --chat-template"
            return f"its tokenizer differs from the expert's (set by {meta.tokenizer_by}) in {what}: {remedy}"
        return ""

    def refusal(self, meta: Meta, expert: str) -> str:
        """Why a party with this base model may not train the expert, with what to do; "" if it may."""
        difference = self.difference(meta)
        return (
            difference
            and f"the base model, tokenizer or chat template does not match expert {expert!r}: {difference}"
        )

    def pin(self, meta: Meta, by: str) -> Meta:
        """`meta` with every unpinned component taken from this identity, which is untrusted."""
        if self.fingerprint and not meta.base_fingerprint:
            fingerprint = self.fingerprint[:MAX_FINGERPRINT_CHARS]
            meta = replace(meta, base_fingerprint=fingerprint, base_fingerprint_by=by)
        pinned = tokenizer_components(meta.tokenizer)
        both = tokenizer_components(self.tokenizer) | pinned
        if both != pinned:
            who = f"{meta.tokenizer_by} and {by}" if pinned else by
            meta = replace(meta, tokenizer=tokenizer_text(both), tokenizer_by=who)
        # A template's text becomes the expert's only if its digest is the pinned one.
        if (
            not meta.chat_template
            and 0 < len(self.chat_template) <= MAX_TEMPLATE_CHARS
            and template_digest(self.chat_template) == both.get("template")
        ):
            meta = replace(meta, chat_template=self.chat_template)
        return meta
