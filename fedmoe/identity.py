"""What makes the base model at hand the one that an expert is trained on, beside its config. Pure.

The first party that has a piece of it pins it in the expert's meta: the aggregator when it creates the expert, else the
first worker, through its heartbeat. All others are compared with what is pinned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedmoe.records import Meta
from fedmoe.spec import Spec
from fedmoe.template_file import MAX_TEMPLATE_CHARS, template_digest

MAX_FINGERPRINT_CHARS = 64
BEAT_FIELDS = ("base_fingerprint", "chat_template")  # of a heartbeat


def expert_template(spec: Spec, meta: Meta) -> str:
    """The chat template that the expert brings, "" if its base model's own serves."""
    return spec.chat_template or meta.chat_template


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """The base model of one party.

    Args:
        fingerprint: of its weights.
        chat_template: the template that a worker brought, "" if it uses the expert's or the base model's own.
    """

    fingerprint: str
    chat_template: str = ""

    @classmethod
    def from_beat(cls, fields: Mapping[str, str]) -> "BaseIdentity":
        """What a heartbeat tells; anybody may have written it."""
        return cls(fingerprint=fields["base_fingerprint"], chat_template=fields["chat_template"])

    def beat_fields(self, meta: Meta | None = None) -> dict[str, str]:
        """Its part of a heartbeat; a template that `meta` holds already is left out."""
        fields = {"base_fingerprint": self.fingerprint}
        if self.chat_template and not (meta and meta.chat_template):
            fields["chat_template"] = self.chat_template
        return fields

    def is_pinned(self, meta: Meta) -> bool:
        """True if `meta` holds every piece that this party could pin."""
        return bool(meta.base_fingerprint) and bool(meta.chat_template or not self.chat_template)

    def difference(self, meta: Meta) -> str:
        """How it differs from what `meta` has pinned, as a clause with what to do; "" if it does not."""
        if meta.base_fingerprint not in ("", self.fingerprint):
            return (
                f"the weights' fingerprint is {self.fingerprint}, the expert's is {meta.base_fingerprint} (pinned by "
                f"{meta.base_fingerprint_by}): use {meta.base_model}, for example not its Base for its Instruct"
            )
        if self.chat_template and meta.chat_template not in ("", self.chat_template):
            return (
                f"its chat template is {template_digest(self.chat_template)}, the expert's is "
                f"{template_digest(meta.chat_template)}: leave --chat-template away, the expert brings its own"
            )
        return ""

    def refusal(self, meta: Meta, expert: str) -> str:
        """Why nobody with this base model may train the expert, as a sentence with what to do; "" if he may."""
        difference = self.difference(meta)
        return (
            difference and f"the base model here is not the one that {expert!r} is trained on: {difference}"
        )

    def pin(self, meta: Meta, by: str) -> Meta:
        """`meta` with every piece that nobody has pinned yet taken from here; anybody may have written it."""
        if self.fingerprint and not meta.base_fingerprint:
            meta = replace(
                meta, base_fingerprint=self.fingerprint[:MAX_FINGERPRINT_CHARS], base_fingerprint_by=by
            )
        if not meta.chat_template and 0 < len(self.chat_template) <= MAX_TEMPLATE_CHARS:
            meta = replace(meta, chat_template=self.chat_template)
        return meta
