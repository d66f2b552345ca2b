"""A router as a directory: the gateway's export, with the experts, what chooses among them, and a script that loads it.

experts/EXPERT/…    the export of each expert among which the router chooses
router.json         kind of router, the experts in order, the base model
router.safetensors  `vectors` (e, d) fp32: row i is the domain vector of the i-th expert; not with arrow
load.py             loads all of it with torch, transformers and peft, without FedMoE, and answers a prompt
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fedmoe.errors import SettingsError, UnknownExpertError
from fedmoe.protocol.layout import layout_of
from fedmoe.protocol.names import GATEWAY
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import Export, read_expert
from fedmoe.tools.export_files import INFO_FILE, write
from fedmoe.tools.routing import ARROW, Router, check_alike, check_arrow, check_number, read_router
from fedmoe.util.disk import write_whole

KINDS = BY_DOMAIN, BY_ARROW = "domain", "arrow"
EXPERTS, ABOUT_FILE, VECTORS_FILE, LOADER_FILE = "experts", "router.json", "router.safetensors", "load.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExport:
    """A router to write.

    Args:
        kind: of KINDS.
        gateway: the gateway, which lies beside the experts.
        experts: in the order of the router's rows.
        router: the domain vectors, None for arrow.
    """

    kind: str
    gateway: Export
    experts: Mapping[str, Export]
    router: Router | None

    @property
    def summary(self) -> str:
        """For people, for example: docs_expert v3 (2 workers, 80 rows), sql_expert v12 (1 worker, 40 rows)."""
        return ", ".join(f"{export.versions}{self._of(name)}" for name, export in self.experts.items())

    def _of(self, name: str) -> str:
        if self.router is None:
            return ""
        workers, rows = self.router.workers[name], self.router.rows[name]
        return f" (vector of {workers} worker{'s' if workers > 1 else ''}, {rows} rows)"

    @property
    def about(self) -> dict[str, Any]:
        """Content of router.json."""
        templates = {export.chat_template for export in self.experts.values()}
        about = {
            "router": self.kind,
            "experts": list(self.experts),
            "base_model": self.gateway.config["base_model_name_or_path"],
            "chat_template": templates.pop() if len(templates) == 1 else "",
        }
        return about | (ARROW if self.kind == BY_ARROW else {})


def read_for_export(
    store: GatewayStore,
    kind: str,
    gateway: Export,
    *,
    leave_out: Collection[str] = (),
    shape: Callable[[Export], Export] = lambda export: export,
    report: Callable[[str], None],
) -> RouterExport:
    """Read the experts, and for the kind "domain" their vectors.

    Args:
        store: of the federation.
        kind: of KINDS.
        gateway: as `read_gateway` gave it, in the wanted shape.
        leave_out: experts to which no prompt is routed.
        shape: gives each expert the wanted rank, dtype and base model's name.
        report: called with a sentence for each expert and each worker's vector that cannot be used.

    Raises:
        UnknownExpertError: if an expert to leave out does not exist.
        SettingsError: if the experts that are left are no two, have no vectors, or do not fit together.
    """
    names = [name for name in store.experts() if name != GATEWAY]
    if odd := sorted(set(leave_out) - set(names)):
        raise UnknownExpertError(
            f"there is no expert {odd[0]!r} to leave out; there are: {', '.join(names)}", about=odd[0]
        )
    specs = {name: store.spec(name) for name in names if name not in leave_out}
    check_number(specs)
    check_alike(specs, {name: store.meta(name).base_fingerprint for name in specs})
    router = read_router(store, specs, report) if kind == BY_DOMAIN else None
    experts = {name: shape(read_expert(store, name)) for name in (router.experts if router else specs)}
    if kind == BY_ARROW:
        check_arrow(
            {name: layout_of(expert.file, expert.dtype) for name, expert in experts.items()},
            "leave one of them out (--leave-out {name}), or give all of them one rank (--rank) if only that differs",
        )
    return RouterExport(kind=kind, gateway=gateway, experts=experts, router=router)


def write_router(directory: str | Path, export: RouterExport, *, force: bool = False) -> str:
    """Write the router; an earlier one in the directory is replaced, adapter by adapter.

    Returns and raises as `export.write`.
    """
    target = Path(directory).resolve()
    info = {**export.gateway.info, "router": f"{export.kind} among {export.summary}"}
    gateway = replace(export.gateway, info=info)
    warning = write(target, gateway, force=force)
    for name, expert in export.experts.items():
        write(target / EXPERTS / name, expert, force=force)
    try:
        if export.router:
            write_whole(target / VECTORS_FILE, save({"vectors": export.router.vectors}))
        else:
            (target / VECTORS_FILE).unlink(missing_ok=True)
        write_whole(
            target / LOADER_FILE, files("fedmoe.tools.loaders").joinpath(f"{export.kind}.py").read_bytes()
        )
        write_whole(target / ABOUT_FILE, json.dumps(export.about, indent=2).encode() + b"\n")
        for place in (
            target / EXPERTS
        ).iterdir():  # experts of an earlier export, which is now gone or left out
            if place.name not in export.experts and (place / INFO_FILE).exists():
                shutil.rmtree(place)
    except OSError as error:
        raise SettingsError(
            f"cannot write to {target} ({error.strerror}): choose a directory you may write to", about="disk"
        ) from error
    return warning
