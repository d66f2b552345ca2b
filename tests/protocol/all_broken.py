"""Every rule that can be taken out of the protocol, by its name."""

from tests.protocol.broken import BROKEN
from tests.protocol.broken_copies import BROKEN_COPIES
from tests.protocol.broken_parts import BROKEN_PARTS
from tests.protocol.broken_recovery import BROKEN_RECOVERY
from tests.protocol.broken_rollback import BROKEN_ROLLBACK
from tests.protocol.broken_tail import BROKEN_TAIL

ALL_BROKEN = BROKEN | BROKEN_RECOVERY | BROKEN_ROLLBACK | BROKEN_TAIL | BROKEN_PARTS | BROKEN_COPIES
