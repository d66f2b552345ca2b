"""The parties of a federation, and the names of their Redis users. Pure.

    fedmoe:worker:sql_expert:w1      fedmoe:aggregator:main      fedmoe:monitor:main      fedmoe:operator:main

A user's name begins with the key prefix, so that several federations can share a server.
"""

from dataclasses import dataclass

from fedmoe.errors import SettingsError
from fedmoe.protocol.names import check_domain, check_name

WORKER = "worker"
ROLES = ("worker", "aggregator", "monitor", "operator")
MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Party:
    """One enrolled user: its role, its name, and the expert if it is a worker.

    Raises:
        SettingsError: for a role that does not exist, or a name that cannot be used.
    """

    role: str
    expert: str = ""
    name: str = MAIN

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise SettingsError(f"role must be one of {', '.join(ROLES)}, not {self.role!r}", about="role")
        check_name("name", self.name)
        if self.role == WORKER:
            check_domain(self.expert)
        elif self.expert:
            raise SettingsError(
                f"expert {self.expert!r}: only a worker belongs to an expert, not the {self.role}",
                about="expert",
            )

    def __str__(self) -> str:
        where = f" of {self.expert}" if self.expert else ""
        return f"{self.role} {self.name}{where}"

    def user(self, prefix: str) -> str:
        """Name of the Redis user."""
        return ":".join(part for part in (prefix, self.role, self.expert, self.name) if part)

    @classmethod
    def of_user(cls, user: str, prefix: str) -> "Party | None":
        """The party with this user; None if the user is not one of this federation."""
        first, *parts = user.split(":")
        if first != prefix or len(parts) not in (2, 3):
            return None
        try:
            return cls(role=parts[0], expert=parts[1] if len(parts) == 3 else "", name=parts[-1])
        except SettingsError:
            return None
