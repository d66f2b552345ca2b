"""The records of the JSON API as JSON Schema; `picture.py` and `events.py` make them. Pure."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
YES: Schema = {"type": "boolean"}


def maybe(schema: Schema, text: str = "") -> Schema:
    """The value, or null if it is unknown."""
    found = {"anyOf": [schema, {"type": "null"}]} if "$ref" in schema else schema | {
        "type": [schema["type"], "null"]
    }  # fmt: skip
    return said(found, text)


def said(schema: Schema, text: str) -> Schema:
    """With a description."""
    return schema | {"description": text} if text else schema


def listed(schema: Schema, text: str = "") -> Schema:
    """A list."""
    return said({"type": "array", "items": schema}, text)


def record(text: str = "", /, **fields: Schema) -> Schema:
    """An object with exactly these fields."""
    return said(
        {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False},
        text,
    )


def ref(name: str) -> Schema:
    """A reference to a named record."""
    return {"$ref": f"#/components/schemas/{name}"}


S = "seconds"
_CURVE = {"version": listed(WHOLE), "loss": listed(maybe(NUMBER))}
_SUMMARY: dict[str, Schema] = {
    "name": TEXT,
    "state": said(TEXT, "serving, idle, held, not served, standing still, getting worse, has a problem or damaged"),
    "is_well": said(YES, "false if an operator may want to look at it"),
    "version": maybe(WHOLE),
    "last_update_s": maybe(NUMBER, f"{S} since the last update was applied"),
    "updates_per_min": said(NUMBER, "applied, over the last five minutes"),
    "examples_per_s": said(NUMBER, "applied, over the last five minutes"),
    "tokens_per_s": said(NUMBER, "of its running workers together"),
    "loss": maybe(NUMBER, "training loss that the last applied update reported"),
    "recent_losses": listed(NUMBER, "at most 40 training losses, averaged, oldest first"),
    "validation": record(best_version=maybe(WHOLE), is_worse=YES),
    "mean_staleness": maybe(NUMBER, "over all applied updates"),
    "waiting": maybe(WHOLE, "updates on the stream"),
    "pending": maybe(WHOLE, "of these, read by an aggregator and not committed"),
    "applied": maybe(WHOLE),
    "refused": maybe(WHOLE),
    "running_workers": WHOLE,
    "served_by": maybe(TEXT, "the aggregator; `somebody` if the dashboard may not read its name"),
    "gateway_weight": maybe(NUMBER),
    "base_model": TEXT,
    "held": said(TEXT, "why its updates wait, empty if they do not"),
}  # fmt: skip
_WORKER: dict[str, Schema] = {
    "expert": TEXT,
    "name": TEXT,
    "has_page": said(YES, "false if no worker may have this name"),
    "state": said(TEXT, "running, joining, quiet; finished, stopped, refused, failed, vanished or not running"),
    "is_alive": YES,
    "is_well": YES,
    "last_seen_s": maybe(NUMBER, f"{S} since its last heartbeat, or since it left"),
    "since": maybe(NUMBER, f"its start ({S} since 1970, by its clock)"),
    "host": TEXT,
    "software": TEXT,
    "step": maybe(WHOLE),
    "loss": maybe(NUMBER),
    "tokens_per_s": maybe(NUMBER),
    "base_version": maybe(WHOLE, "of the expert, as it last pulled it"),
    "behind": maybe(WHOLE, "updates applied since"),
    "staleness": maybe(WHOLE, "of its last decided update"),
    "in_flight": maybe(WHOLE, "number of its undecided update"),
    "published": maybe(WHOLE),
    "refused": maybe(WHOLE),
    "problem": said(TEXT, "what hinders it now, or why it left"),
    "contribution": record(
        "its part in the newest updates that the log holds (at most 2000)",
        updates=WHOLE, examples=WHOLE, share=said(NUMBER, "of the sum of factor × norm"),
    ),
    "validation": maybe(record(
        rows=WHOLE, best=NUMBER, best_version=WHOLE, last=NUMBER, last_version=WHOLE, trend=TEXT, is_worse=YES
    )),
}  # fmt: skip
_REFUSAL = record(at=NUMBER, worker=TEXT, seq=maybe(WHOLE), reason=TEXT)

SCHEMAS: dict[str, Schema] = {
    "Error": record(error=record(message=TEXT, about=TEXT)),
    "Findings": listed(TEXT, "what an operator should look at, one sentence each"),
    "ExpertSummary": record(**_SUMMARY),
    "Worker": record(**_WORKER),
    "Refusal": _REFUSAL,
    "Change": record(at=NUMBER, version=maybe(WHOLE), text=TEXT),
    "Expert": record(
        **_SUMMARY,
        unread=maybe(WHOLE, "updates that no aggregator has read"),
        garbage=maybe(WHOLE),
        examples=maybe(WHOLE),
        tokens=maybe(WHOLE),
        weights_bytes=maybe(WHOLE),
        lineage=TEXT,
        problems=listed(TEXT),
        training_curve=record(**_CURVE),
        validation_curves=listed(record(worker=TEXT, rows=maybe(WHOLE), **_CURVE)),
        staleness=listed(record(first=WHOLE, last=maybe(WHOLE), updates=WHOLE)),
        throughput=record(at=listed(NUMBER), updates_per_min=listed(NUMBER)),
        workers=listed(ref("Worker")),
        refusals=listed(ref("Refusal"), "newest first"),
        changes=listed(ref("Change"), "newest first"),
        rules=maybe(record(number=WHOLE, values={"type": "object"})),
        log_updates=said(WHOLE, "number of updates behind curves, staleness and contributions"),
    ),
    "WorkerPage": record(
        **_WORKER,
        training_curve=record(**_CURVE),
        validation_curve=record(rows=maybe(WHOLE), **_CURVE),
        refusals=listed(ref("Refusal"), "newest first"),
        log_updates=WHOLE,
    ),
    "Workers": record(total=WHOLE, workers=listed(ref("Worker"))),
    "Aggregator": record(
        name=TEXT,
        serves=listed(TEXT, "experts, and `merged` for the merged gateway"),
        overdue=listed(TEXT, "experts of these whose updates waited for several sync intervals"),
        limit=maybe(WHOLE, "the most experts that it takes, because it could not keep up with more"),
        since=said(NUMBER, f"when it started, by its own clock ({S} since 1970)"),
        software=TEXT,
    ),
    "Gateway": record(
        trained=maybe(TEXT, "the expert that is the trained gateway"),
        merged=record(
            exists=YES,
            method=TEXT,
            rank=maybe(WHOLE),
            updated_at=maybe(NUMBER),
            relative_error=maybe(NUMBER),
            served_by=maybe(TEXT),
            made_of=listed(
                record(
                    expert=TEXT,
                    version=maybe(WHOLE),
                    present_version=maybe(WHOLE),
                    is_outdated=YES,
                    weights=listed(NUMBER),
                )
            ),
            fit=maybe(
                record(
                    is_used=YES,
                    loss=maybe(NUMBER, "on the validation rows"),
                    before=listed(record(what=TEXT, loss=maybe(NUMBER))),
                    rows=WHOLE,
                    fitted_at=maybe(NUMBER),
                )
            ),
            problems=listed(TEXT),
        ),
    ),
    "Redis": record(
        is_here=YES,
        problem=said(TEXT, "why it did not answer the last look, empty if it did"),
        url=TEXT,
        software=TEXT,
        used_memory=maybe(WHOLE, "bytes"),
        max_memory=maybe(WHOLE, "bytes, 0 for no bound"),
        policy=maybe(TEXT),
        latency_ms=maybe(NUMBER, "of one round trip"),
        clients=maybe(WHOLE),
        uptime_s=maybe(WHOLE),
        is_aof_on=maybe(YES),
        persists=maybe(YES, "its last writes to disk succeeded"),
        saved_s=maybe(NUMBER, f"{S} since its last snapshot"),
        unsaved=maybe(WHOLE, "changes since then"),
    ),
    "Event": record(number=WHOLE, at=NUMBER, kind=TEXT, is_bad=YES, expert=TEXT, worker=TEXT, text=TEXT),
    "Events": record(events=listed(ref("Event"), "newest first")),
    "Federation": record(
        prefix=TEXT,
        look=said(WHOLE, "number of the look at Redis"),
        at=said(NUMBER, f"when Redis last answered ({S} since 1970), 0 for never"),
        findings=ref("Findings"),
        totals=record(
            experts=WHOLE, serving=WHOLE, workers=WHOLE, quiet=WHOLE, waiting=WHOLE, applied=WHOLE, refused=WHOLE,
            updates_per_min=NUMBER, tokens_per_s=NUMBER,
        ),
        experts=listed(ref("ExpertSummary")),
        aggregators=listed(ref("Aggregator"), "those that live"),
        gateway=ref("Gateway"),
        redis=ref("Redis"),
    ),
    "Experts": record(experts=listed(ref("ExpertSummary"))),
}  # fmt: skip
