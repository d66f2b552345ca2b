"""The model card of an export, and what a server needs to serve it. Pure."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedmoe.tools.losses import training_loss
from fedmoe.util.text import printable

if TYPE_CHECKING:
    from fedmoe.tools.export import Export, Fitted

# What vLLM takes as --max-lora-rank; it serves adapters up to that rank. (It takes 1 too.)
# Source: vllm/config/lora.py, MaxLoRARanks.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_WHAT = {
    "expert": "One expert",
    "trained": "The gateway, trained by the workers of all experts,",
    "merged": "The merge of all experts",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def max_lora_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` with which vLLM serves an adapter of this rank; None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm_hint(rank: int) -> str:
    """What vLLM needs to serve an adapter of this rank, and how to change the rank; "" if its defaults suffice."""
    if rank <= VLLM_DEFAULT_RANK:
        return ""
    fits = max_lora_rank(rank)
    if fits is None:
        return f"vLLM serves no adapter of a rank above {VLLM_RANKS[-1]}: for vLLM, export with --rank {VLLM_RANKS[-1]}"
    smaller = max(allowed for allowed in VLLM_RANKS if allowed < rank)
    cut = f"`--rank {smaller}` lowers its rank and prints the error"
    if fits == rank:
        return f"vLLM needs --max-lora-rank {fits} to serve it; {cut}"
    return (
        f"rank {rank} is none that servers reserve memory for ({', '.join(map(str, VLLM_RANKS))}): vLLM needs "
        f"--max-lora-rank {fits} to serve it; `--rank {fits}` pads it with zeros, which changes nothing else; {cut}"
    )


def card(export: "Export", *, model_dtype: str = "") -> str:
    """The model card of an adapter, or of a whole model of this dtype into which it was merged.

    The front matter names the base model only if that may be a hub id.
    """
    is_model = bool(model_dtype)
    base = str(export.info["base_model"])
    relation = "finetune" if is_model else "adapter"
    front = [f"base_model: {base}", f"base_model_relation: {relation}"] if _HUB_ID.fullmatch(base) else []
    front += [f"library_name: {'transformers' if is_model else 'peft'}", "pipeline_tag: text-generation"]
    front += ["tags:", "- lora", "- fedmoe"]
    shape = f"rank {export.config.get('r')}, alpha {export.config.get('lora_alpha')}, {export.dtype}"
    code = "`" + printable(base, None).replace("`", "'") + "`"
    form = f"a LoRA adapter ({shape}) for {code}"
    if is_model:
        form = f"{code} with a LoRA adapter ({shape}) merged into its weights, which are {model_dtype}"
    lines = ["---", *front, "---", f"# {export.name}", ""]
    lines += [f"{_WHAT[export.kind]} of a FedMoE federation: {form}.", "", *_contents(export), ""]
    lines += [*(_load_model(export) if is_model else _load_adapter(base)), ""]
    if not is_model:
        lines += [*_serve(export, base), ""]
    if router := export.info.get("router"):
        lines += [f"`load.py` answers with the experts in `experts/` instead, routed by {router}.", ""]
    return "\n".join(lines)


def _contents(export: "Export") -> Iterator[str]:
    """The experts, versions, weights and losses that are in it, as tables."""
    yield "| built from | version | commit | weight | rows | training loss | validation loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, part in export.built_from.items():
        weights = export.weights.get(name, ())
        cells = [
            name,
            str(part["version"]),
            f"`{part['weights_commit']}`",
            " / ".join(f"{weight:.3g}" for weight in weights) or ("0" if export.weights else ""),
        ]
        meta = export.metas.get(name)
        if meta is None or meta.weights_commit != part["weights_commit"]:  # its losses are of another version
            cells += ["", ""]
        else:
            cells += [str(meta.n_examples), _loss(training_loss(meta))]
        measured = export.validation if name == export.name else export.validations.get(name)
        cells.append(f"{measured.mean:.4f} (v{measured.version})" if measured else "")
        yield f"| {' | '.join(cells)} |"
    if settings := export.info.get("settings"):
        yield ""
        yield f"Merged with `{settings}`."
    if export.fitted:
        yield ""
        yield _fit_text(export.fitted)
    if export.kind == "merged" and export.validation:
        yield ""
        yield f"Validation loss of the merged gateway itself: {export.validation.mean:.4f}."
    if export.trained_by:
        yield ""
        yield "| trained by the workers of | workers | updates | last training loss |"
        yield "| --- | --- | --- | --- |"
        for name, team in export.trained_by.items():
            yield f"| {name} | {team.workers} | {team.updates} | {_loss(team.loss)} |"
    yield ""
    yield (
        "Losses are in nats per token. The training loss is that of the last update. The validation loss is the newest "
        "one that the workers measured, on rows which they held back, with the version that they measured."
    )
    if error := export.info.get("truncation_relative_error"):
        yield ""
        yield f"Truncated from rank {export.info['truncated_from_rank']}, relative error {error:.2%}."
    for name, known in (("Base model", "base_fingerprint"), ("Exported by", "exported_by")):
        if text := export.info.get(known):
            yield ""
            yield f"{name}: {'fingerprint ' if name == 'Base model' else ''}`{text}`."


def _fit_text(fitted: "Fitted") -> str:
    rows = ", ".join(f"{count} rows of {domain}" for domain, count in fitted.rows.items())
    before = ", ".join(f"{name} {loss:.4f}" for name, loss in fitted.before.items())
    text = f"The weights were fitted on {rows or 'validation rows'}. Loss on them: {_loss(fitted.loss) or 'unknown'}"
    return f"{text} (before the fit: {before})." if before else f"{text}."


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _load_adapter(base: str) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
        'model = PeftModel.from_pretrained(base, "the/directory/of/this/file")',
        "```",
    ]


def _load_model(export: "Export") -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("the/directory/of/this/file")',
        "```",
    ]


def _serve(export: "Export", base: str) -> list[str]:
    """How vLLM serves it."""
    fits = max_lora_rank(int(export.config.get("r", 0)))
    if fits is None:
        return [f"vLLM serves no adapter of a rank above {VLLM_RANKS[-1]}."]
    name = export.name.replace(" ", "-")
    options = f"--enable-lora --max-lora-rank {fits} --lora-modules {name}=the/directory/of/this/file"
    return ["With vLLM:", "", "```sh", f"vllm serve {shlex.quote(printable(base, None))} {options}", "```"]
