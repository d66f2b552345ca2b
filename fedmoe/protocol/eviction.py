"""Whether a full Redis may evict keys, and where the operator of this kind of server changes that. Pure."""

from urllib.parse import urlsplit

SAFE = "noeviction"
# Host suffixes of managed servers, on which CONFIG SET does not change settings.
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
    """What a server with this maxmemory-policy may evict, and where to change the policy; "" if nothing.

    Args:
        policy: of the server, "" if unknown.
        url: of the server; its host name tells the provider.
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
