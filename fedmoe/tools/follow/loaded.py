"""The versions that a running server has loaded, and which of them this directory's `follow` has loaded itself.

Only those are unloaded. Another `follow`, of another gateway or federation, may load its versions into the same server.
"""

import logging

from fedmoe.errors import AdapterRefusedError
from fedmoe.tools.follow.directory import VersionDirectory
from fedmoe.tools.follow.servers import AdapterServer

logger = logging.getLogger(__name__)


class LoadedVersions:
    """Loads the versions of a directory into a server, and unloads them."""

    def __init__(self, server: AdapterServer, directory: VersionDirectory) -> None:
        self._server, self._directory = server, directory
        self._has_told = False

    def load(self, name: str) -> set[str]:
        """Load a version unless the server has it; returns what the server had loaded before.

        Raises:
            AdapterRefusedError: if the server does not take it.
            ServerAwayError: if the server cannot be reached.
            SettingsError: if the disk refuses.
        """
        there, own = self._server.loaded(), self._directory.loaded
        # Noted first: this process may be killed after the load, and `current`, which stands for a missing note, moves.
        self._directory.note_loaded(own if name in there else own | {name})
        if name in there:
            return there
        try:
            self._server.load(name, self._directory.path(name))
        except AdapterRefusedError:
            self._directory.note_loaded(own)
            if name not in self._server.loaded():  # another `follow` has just loaded the same version
                raise
        logger.info("%s: loaded into %s", name, self._server.shown)
        return there

    def unload(self, there: set[str], *, but: str) -> None:
        """Unload all own versions but one, of those that the server has; raises as `load`."""
        own = self._directory.loaded
        for name in sorted(own & there - {but}):
            self._server.unload(name)
            logger.info("%s: unloaded", name)
        self._directory.note_loaded(own & {but})
        others = sorted(name for name in there - own - {but} if self._directory.is_version(name))
        if others and not self._has_told:
            logger.warning(
                "the server at %s has %s, which this `follow` has not loaded and does not unload: if another `follow` "
                "loads versions into it, give each a --name of its own; otherwise unload them by hand",
                self._server.shown, ", ".join(others),
            )  # fmt: skip
        self._has_told = bool(others)
