"""May a full Redis throw keys away, and how is that changed on this kind of server? Pure."""

from urllib.parse import urlsplit

SAFE = "noeviction"
# Hosts of managed servers, whose settings no CONFIG SET changes.
_MANAGED = {
    ".cache.amazonaws.com": "in the parameter group of its ElastiCache",
    ".amazonaws.com": "in its parameter group",
    ".redis.cache.windows.net": "under Advanced settings of its Azure cache",
    ".azure.net": "under Advanced settings of its Azure cache",
    ".redis-cloud.com": "as the eviction policy of its database (No eviction) in Redis Cloud",
    ".redislabs.com": "as the eviction policy of its database (No eviction) in Redis Cloud",
    ".upstash.io": "by switching Eviction off for its database at Upstash",
    ".aivencloud.com": "as redis_maxmemory_policy in its advanced configuration at Aiven",
    ".ondigitalocean.com": "as its eviction policy (noeviction) at DigitalOcean",
}
_OWN = (
    "with `redis-cli CONFIG SET maxmemory-policy noeviction` and in redis.conf (on a managed server, where its "
    "provider sets it)"
)


def eviction_threat(policy: str, url: str) -> str:
    """What a server with this maxmemory-policy may throw away, and where to change that; "" if nothing.

    Args:
        policy: of the server, "" if it is not known.
        url: of the server; the host's name tells who manages it.
    """
    if policy in ("", SAFE):
        return ""
    what = (
        "updates that wait, heartbeats and leases"
        if policy.startswith("volatile")
        else "experts, updates that wait and leases"
    )
    host = urlsplit(url).hostname or ""
    where = next((place for suffix, place in _MANAGED.items() if host.endswith(suffix)), _OWN)
    return f"may throw away {what} when it is full (maxmemory-policy {policy}): set it to {SAFE} {where}"
