"""The complete map of Redis keys; no other module spells a key.

All keys of one expert carry its name as a hash tag, so that they share one Cluster slot and a commit is one
transaction. The prefix `fedmoe` is a setting, so that several federations can share a server.

    fedmoe:experts                                  hash    expert -> its weight in the merged gateway
    fedmoe:aggregators                              hash    aggregator -> its heartbeat and when that ends
    fedmoe:audit                                    stream  who enrolled or revoked whom, and when
    fedmoe:{E}:updates                              stream  one readable entry per waiting update; a doorbell only
    fedmoe:{E}:payload:<worker>:<run>:<seq>:header  string  header (msgpack), decides; expires
    fedmoe:{E}:payload:<worker>:<run>:<seq>:<part>  string  one part (msgpack), at most 1 MiB; expires
    fedmoe:{E}:payload:<worker>:incarnation         string  counts the worker's runs; expires
    fedmoe:{E}:payload:<worker>:trace               hash    how the worker left; outlives the heartbeat; expires
    fedmoe:{E}:payload:<worker>:trial:<name>        hash    `fedmoe doctor` tries transactions here; expires
    fedmoe:{E}:weights                              string  the expert, a safetensors file; the tail comes on top
    fedmoe:{E}:tail                                 hash    updates applied since `weights` were written (tail.py)
    fedmoe:{E}:tail:<token>:<part>                  string  a part of such an update, copied from its payload; expires
                                                            until a commit makes it permanent
    fedmoe:{E}:weights:<commit>:<part>              string  values of weights that are too long for one string;
    fedmoe:{E}:server_state:<commit>:<part>                 the keys before then hold the headers (weights_parts.py)
    fedmoe:{E}:packed                               string  packed weights, for pulls (packed.py); none in format fp32
    fedmoe:{E}:server_state                         string  what the server optimizer remembers, a safetensors file;
                                                            none with the optimizer sgd
    fedmoe:{E}:meta                                 hash    version, lineage, commit, rules in force, counters; readable
                                                            (removed expert: time of removal, last commit)
    fedmoe:{E}:spec                                 string  JSON: base model, LoRA, layout; never changes
    fedmoe:{E}:decided                              hash    worker -> its last decided update and how (JSON)
    fedmoe:{E}:vectors                              hash    worker -> its domain vector (JSON); absent if withheld
    fedmoe:{E}:worker:<worker>                      hash    heartbeat; expires
    fedmoe:{E}:log                                  stream  one line per applied update, change of rules, rollback
    fedmoe:{E}:dead                                 stream  refused updates and garbage, with the reason; capped
    fedmoe:{E}:lease                                string  the aggregator that serves this expert; expires
    fedmoe:{E}:lost                                 hash    worker -> lineage it knew when the expert was found lost
    fedmoe:{E}:claims                               hash    aggregator -> the version it retains; expires
    fedmoe:{E}:problem                              hash    aggregator -> what it cannot do now; expires
    fedmoe:{gateway}:…                                      the trained gateway: an expert like any other
    fedmoe:{merged}:weights, :meta, :lease, :problem        the merged gateway, rebuilt whenever an expert changes
    fedmoe:{merged}:fit                             hash    weights of the experts, fitted on validation rows
    fedmoe:{merged}:weights:<generation>:<part>     string  a part of weights that are too long for one string

Whatever merges writes only below `fedmoe:{merged}`, so it never writes where an expert's spec and meta lie.

Write permissions: a worker writes only `payload:<itself>:*` and `worker:<itself>`, and adds to `updates`; aggregators
write all other keys, and operators the fit and the audit log.
"""

from dataclasses import dataclass

from fedmoe.protocol.names import MERGED, check_name

DEFAULT_PREFIX = "fedmoe"
GROUP = "aggregator"


def absent(key: str) -> str:
    """A key in the slot of this one that never exists: no worker may write it, and nobody else does.

    A script names it among its keys. While a Redis Cluster moves the slot to another node, it then refuses the script
    as a whole: it would refuse a command in the middle of it, after others were executed.
    """
    return f"{key.partition('}')[0]}}}:payload::absent"


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """The keys of one expert (or of the merged gateway, which has no updates)."""

    root: str

    @property
    def updates(self) -> str:
        return f"{self.root}:updates"

    @property
    def weights(self) -> str:
        return f"{self.root}:weights"

    def weights_part(self, generation: str, index: int | str) -> str:
        """Key of a part of weights; `generation` is their commit, or that of a merged gateway. `*` stands for all."""
        return f"{self.weights}:{generation}:{index}"

    def server_state_part(self, commit: str, index: int | str) -> str:
        """Key of a part of a server state."""
        return f"{self.server_state}:{commit}:{index}"

    @property
    def tail(self) -> str:
        """Key of the updates that were applied since the weights were written."""
        return f"{self.root}:tail"

    def tail_part(self, token: str, index: int | str) -> str:
        """Key of a copied part of an update; `token` is of the attempt to decide it. `*` stands for all."""
        return f"{self.tail}:{token}:{index}"

    @property
    def parts(self) -> str:
        """Pattern of all parts of weights and server state, and of all copies."""
        return f"{self.root}:[wst]*:*:*"

    @property
    def packed(self) -> str:
        """Key of the weights as workers pull them."""
        return f"{self.root}:packed"

    @property
    def server_state(self) -> str:
        return f"{self.root}:server_state"

    @property
    def meta(self) -> str:
        return f"{self.root}:meta"

    @property
    def spec(self) -> str:
        return f"{self.root}:spec"

    @property
    def decided(self) -> str:
        return f"{self.root}:decided"

    @property
    def vectors(self) -> str:
        return f"{self.root}:vectors"

    @property
    def log(self) -> str:
        return f"{self.root}:log"

    @property
    def dead(self) -> str:
        return f"{self.root}:dead"

    @property
    def lease(self) -> str:
        return f"{self.root}:lease"

    @property
    def lost(self) -> str:
        return f"{self.root}:lost"

    @property
    def claims(self) -> str:
        return f"{self.root}:claims"

    @property
    def problem(self) -> str:
        return f"{self.root}:problem"

    @property
    def members(self) -> str:
        """Pattern of all workers' heartbeats and traces; it also matches payloads and a few other keys."""
        return f"{self.root}:[wp]*"

    @property
    def fit(self) -> str:
        """Key of the merged gateway's fit."""
        return f"{self.root}:fit"

    def worker(self, worker: str) -> str:
        return f"{self.root}:worker:{worker}"

    def header(self, worker: str, run: str, seq: int) -> str:
        return f"{self.root}:payload:{worker}:{run}:{seq}:header"

    def incarnation(self, worker: str) -> str:
        return f"{self.root}:payload:{worker}:incarnation"

    def trace(self, worker: str) -> str:
        return f"{self.root}:payload:{worker}:trace"

    def payloads(self, worker: str) -> str:
        """Pattern of all keys of a worker's updates; worker `*` for those of all workers."""
        return f"{self.root}:payload:{worker}:*"

    def trial(self, worker: str, name: str) -> str:
        """A key on which permissions are tried."""
        return f"{self.root}:payload:{worker}:trial:{name}"

    def part(self, worker: str, run: str, seq: int, index: int) -> str:
        return f"{self.root}:payload:{worker}:{run}:{seq}:{index}"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one federation."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        check_name("prefix", self.prefix)

    @property
    def experts(self) -> str:
        return f"{self.prefix}:experts"

    @property
    def aggregators(self) -> str:
        return f"{self.prefix}:aggregators"

    @property
    def audit(self) -> str:
        return f"{self.prefix}:audit"

    def expert(self, name: str) -> ExpertKeys:
        return ExpertKeys(f"{self.prefix}:{{{name}}}")

    @property
    def merged(self) -> ExpertKeys:
        return self.expert(MERGED)
