"""May a full Redis evict keys, and how is that changed on this kind of server? Pure."""

from urllib.parse import urlsplit

SAFE = "noeviction"
# Hosts of managed servers, whose settings no CONFIG SET changes.
_MANAGED = {
    ".cache.amazonaws.com": "in the parameter group of its ElastiCache",
    ".amazonaws.com": "in its parameter group",
    ".redis.cache.windows.net": "under Advanced settings of its Azure cache",
    ".azure.net": "under Advanced settings of its Azure cache",
    ".redis-cloud.com": "(in Redis Cloud: the database's eviction policy, No eviction)",
    ".redislabs.com": "(in Redis Cloud: the database's eviction policy, No eviction)",
    ".upstash.io": "(at Upstash: switch Eviction off for the database)",
    ".aivencloud.com": "(at Aiven: redis_maxmemory_policy in the advanced configuration)",
    ".ondigitalocean.com": "(at DigitalOcean: the eviction policy of the database)",
}
_OWN = (
    "with `redis-cli CONFIG SET maxmemory-policy noeviction` and in redis.conf (on a managed server: in its "
    "provider's settings)"
)


def eviction_threat(policy: str, url: str) -> str:
    """What a server with this maxmemory-policy may evict, and where to change that; "" if nothing.

    Args:
        policy: of the server, "" if it is not known.
        url: of the server; the host's name tells who manages it.
    """
    if policy in ("", SAFE):
        return ""
    what = (
        "waiting updates, heartbeats and leases"
        if policy.startswith("volatile")
        else "experts, waiting updates and leases"
    )
    host = urlsplit(url).hostname or ""
    where = next((place for suffix, place in _MANAGED.items() if host.endswith(suffix)), _OWN)
    return f"may evict {what} when it is full (maxmemory-policy {policy}): set maxmemory-policy to {SAFE} {where}"
