"""What a line of ACL LIST says, as Redis 7.0 and later servers write it."""

from fedmoe.protocol.parties import Party
from fedmoe.store.user import User

PARTY = Party(role="monitor")


def parse(rules: str) -> User:
    return User.parse(PARTY, f"user fedmoe:monitor:main on {rules}")


def test_servers_write_the_same_rights_in_different_ways() -> None:
    """Order, categories in place of their commands, and words without meaning."""
    given = parse("resetkeys resetchannels ~a %R~b -@all +multi +exec +watch +unwatch +get (%R~c -@all +set)")
    redis7 = parse(
        "sanitize-payload %R~b ~a resetchannels -@all +@transaction +get -discard (%R~c -@all +set)"
    )
    valkey9 = parse("alldbs %W~a %R~a %R~b -@all +get +exec +unwatch +watch +multi (%R~c resetchannels +set)")
    assert given == redis7 == valkey9
    assert {"%R~a", "%W~a", "%R~b", "+multi", "%R~c +set"} < given.rights


def test_what_gives_more_is_not_the_same() -> None:
    """A password, a key's mode, another category, a channel, no password, and a user that is off."""
    own = "#" + "0" * 64
    rules = f"{own} %R~b -@all +get"
    assert parse(rules).hashes == (own,)
    others = [
        "%R~b -@all +get",
        rules.replace("%R~b", "~b"),
        f"{rules} +@hash",
        f"{rules} &*",
        f"{rules} nopass",
    ]
    assert parse(rules) not in [*map(parse, others), User.parse(PARTY, f"user x off {rules}")]
    assert parse(f"{rules} +@hash").rights - parse(rules).rights == {"+@hash"}
    assert parse("-@all +get +@all").rights == {"+get", "+@all"}
