"""An adapter as a zip file, read from Redis when somebody asks for it."""

import os
import tempfile
import threading
import zipfile
from pathlib import Path

from fedmoe.errors import RedisUnfitError
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_expert, read_gateway
from fedmoe.tools.export_files import write_files

_ONE_AT_A_TIME = threading.Lock()  # an adapter is in memory while it is packed


def pack(redis: RedisSettings, expert: str) -> tuple[Path, str]:
    """A temporary zip file with an expert's adapter ("" for the gateway's), and the name to give it.

    Raises:
        UnknownExpertError: if there is none.
        RedisUnfitError: if this user may not read weights.
        RedisUnavailableError: if Redis does not answer.
    """
    with _ONE_AT_A_TIME:
        connection = Connection(redis)
        try:
            store = GatewayStore(connection)
            export = read_expert(store, expert) if expert else read_gateway(store)
        except RedisUnfitError as error:
            if error.about == "rights":
                raise RedisUnfitError(
                    "the dashboard's user in Redis may not read weights: give it the rights of "
                    "`fedmoe doctor --acl operator`, or start it without --downloads",
                    about="rights",
                ) from error
            raise
        finally:
            connection.close()
        name = f"{export.name.replace(' ', '-')}-v{export.version}"
        with tempfile.TemporaryDirectory(prefix="fedmoe-") as directory:
            write_files(Path(directory), export)
            return _zip(Path(directory), name), f"{name}.zip"


def _zip(directory: Path, name: str) -> Path:
    handle, file = tempfile.mkstemp(prefix="fedmoe-", suffix=".zip")
    try:
        with os.fdopen(handle, "wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for one in sorted(directory.rglob("*")):
                archive.write(one, f"{name}/{one.relative_to(directory)}")
    except BaseException:
        Path(file).unlink()
        raise
    return Path(file)
