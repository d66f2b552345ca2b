"""What the units of systemd say, and how long a worker's stop may take."""

import configparser

from fedmoe.settings import WorkerSettings
from fedmoe.util.setting import declared
from fedmoe.util.stopping import LONGEST_SAVE_S
from producers.training import END_S, LEAVE_S
from tests.documents import ROOT

UNITS = ROOT / "ops" / "systemd"
_DRAIN_S = next(one.default for one in declared(WorkerSettings) if one.name == "drain")
LONGEST_STOP_S = _DRAIN_S + LEAVE_S + END_S + LONGEST_SAVE_S


def read(name: str) -> configparser.SectionProxy:
    """The section [Service]; of a name that is there twice, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str
    parser.read(UNITS / name)
    return parser["Service"]
