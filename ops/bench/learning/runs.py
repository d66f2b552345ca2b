"""The plan of the measurement: what a run is, which workers take part in it, and which runs belong to which part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import ADAPTIVE, BY_DOMAIN, BY_WORKER, NESTEROV, SGD, AggregationRules
from ops.bench.plan import NEW_GATEWAY

DOMAINS = ("python_expert", "sql_expert", "docs_expert")
HALVES = tuple(
    f"{name.removesuffix('_expert')}{half}_expert" for name in DOMAINS for half in (1, 2)
)  # by source
SYNC_S = 6.0  # virtual seconds between two updates of a worker, and its steps meanwhile
TRACE_ROWS = 16  # held-out rows of a domain at most, where the loss is measured along the way
ALL = "all"  # a worker of this domain has the rows of every domain
ONE_PASS, BLOCKS = "onepass", "blocks"
SCHEMES = {
    "apart": "each worker trains its domain's expert",
    "gateway": "every worker trains the gateway",
    "turns": "gateway and expert take steps in turn, each on rows of its own",
    "twice": "gateway and expert take a step each on the same rows",
    "residual": "as `twice`; the expert is trained on top of the gateway",
    ONE_PASS: "gateway and expert are active together and take their steps by the same pass",
    BLOCKS: "each worker trains its domain's adapter, with those of the other domains active and frozen as last pulled",
    "central": "one worker has all rows and trains the gateway",
    "real": "every worker trains the gateway, in real processes, with the rules of a new gateway",
    "rounds": "every worker trains the gateway, in rounds that end when the slowest has taken its steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One virtual worker.

    Args:
        name, domain: its own name, and the domain of its rows.
        speed: optimizer steps in a virtual second.
        start_s, stop_s: virtual seconds between which it trains.
        share: of the domain's rows that it has.
    """

    name: str
    domain: str
    speed: float = 1.0
    start_s: float = 0.0
    stop_s: float
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training with its evaluation.

    Args:
        scheme: what the workers train, a key of SCHEMES.
        mix: the workers, a key of MIXES.
        steps: optimizer steps of a domain, if the mix has one worker a domain and one chain is trained.
        gain, balance: rules by which updates are aggregated (see `fedmoe.protocol.rules`).
        optimizer: the server optimizer; momentum: of nesterov; lr: of adaptive, in units of the weights.
        without: a domain whose updates a replay leaves out afterwards; that gateway is measured too.
        compute: how many times as long the workers train.
        rank: of the adapter; alpha is twice the rank.
        seed: of initial weights, order of rows and delays.
        rows: held-out rows of each domain.
        sync_s: virtual seconds between two updates of a worker; in rounds, the steps of each worker; in real
            processes, real seconds.
        delay_s: least and longest time between making and applying an update, and between applying and pulling.
        merges: measure merges and routers of experts trained apart, too.
        trace: measure the gateway's loss also along the way, every `sync_s` virtual seconds or after each round.
    """

    scheme: str
    mix: str = "three"
    steps: int = 48
    gain: float = 1.0
    balance: str = BY_WORKER
    optimizer: str = SGD
    momentum: float = 0.5
    lr: float = 1.0
    without: str = ""
    compute: float = 1.0
    rank: int = 8
    seed: int = 0
    rows: int = 128
    sync_s: float = SYNC_S
    delay_s: tuple[float, float] = (0.1, 0.5)
    wire_format: str = "int4"
    merges: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        if self.scheme != "apart":  # it has nothing to merge, so both are the same run
            object.__setattr__(self, "merges", True)

    @property
    def name(self) -> str:
        """The name of the run and of its file."""
        amount = f"x{self.gain:g}" + (f"-compute{self.compute:g}" if self.compute != 1 else "")
        amount += f"-{self.wire_format}" if self.wire_format != "int4" else ""
        amount += f"-by-{self.balance}" if self.balance != BY_WORKER else ""
        amount += f"-without-{self.without}" if self.without else ""
        amount += f"-sync{self.sync_s:g}" if self.sync_s != SYNC_S else ""
        amount += {NESTEROV: f"-nesterov{self.momentum:g}", ADAPTIVE: f"-adaptive{self.lr:g}"}.get(
            self.optimizer, ""
        )
        amount += ("" if self.merges else "-plain") + ("-trace" if self.trace else "")
        return f"{self.mix}-{self.steps}-r{self.rank}-s{self.seed}-n{self.rows}-{self.scheme}-{amount}"

    @property
    def rules(self) -> AggregationRules:
        """How updates are aggregated."""
        return AggregationRules(
            lr=self.lr,
            gain=self.gain,
            balance=self.balance,
            server_optimizer=self.optimizer,
            server_momentum=self.momentum,
        )

    @property
    def group(self) -> tuple[str, int, int, int]:
        """The runs with which it may be compared have the same group."""
        return self.mix, self.steps, self.rank, self.rows

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains on which its models are measured: those that its mix trains."""
        present = {plan.domain for plan in MIXES[self.mix](self.steps)}
        return tuple(name for name in (*DOMAINS, *HALVES) if name in present)

    def chains(self, worker: WorkerPlan) -> tuple[str, ...]:
        """The chains that a worker trains, in turn."""
        match self.scheme:
            case "apart" | "blocks":
                return (worker.domain,)
            case "gateway" | "central" | "rounds" | "real":
                return (GATEWAY,)
        return (GATEWAY, worker.domain)

    def beside(self, chain: str) -> tuple[str, ...]:
        """The chains whose weights are active and frozen while a worker trains this one."""
        return tuple(name for name in self.domains if name != chain) if self.scheme == BLOCKS else ()

    @property
    def adds_up(self) -> bool:
        """True if a model is the sum of several chains.

        Then each chain has an initialisation of its own: with the same one they would get the same gradients.
        """
        return self.scheme in (ONE_PASS, BLOCKS)

    def workers(self) -> tuple[WorkerPlan, ...]:
        """The workers of this run."""
        if self.scheme == "central":
            total = sum((one.stop_s - one.start_s) * one.speed for one in MIXES[self.mix](self.steps))
            return (WorkerPlan(name="centre", domain=ALL, stop_s=total),)
        return MIXES[self.mix](self.steps * self.compute)


def _three(seconds: float, **odd: dict[str, float]) -> tuple[WorkerPlan, ...]:
    """One worker a domain; `odd` changes the plan of a domain's worker."""
    changes = {domain: odd.get(domain.partition("_")[0], {}) for domain in DOMAINS}
    return tuple(
        WorkerPlan(**({"name": domain, "domain": domain, "stop_s": seconds} | changes[domain]))
        for domain in DOMAINS
    )


def _many(seconds: float, **counts: int) -> tuple[WorkerPlan, ...]:
    return tuple(
        WorkerPlan(name=f"{short}{number}", domain=f"{short}_expert", stop_s=seconds)
        for short, count in counts.items()
        for number in range(count)
    )


MIXES: dict[str, Callable[[float], tuple[WorkerPlan, ...]]] = {
    "three": _three,
    "six": lambda seconds: tuple(WorkerPlan(name=name, domain=name, stop_s=seconds) for name in HALVES),
    "one": lambda seconds: _many(seconds, sql=1),
    "eight": lambda seconds: _many(seconds * 3 / 8, python=3, sql=3, docs=2),
    "slow": lambda seconds: _three(seconds, sql={"speed": 0.25}),
    "late": lambda seconds: _three(seconds, docs={"start_s": seconds / 2}),
    "stops": lambda seconds: _three(seconds, python={"stop_s": seconds / 2}),
    "rows": lambda seconds: _three(seconds, sql={"share": 0.1}, docs={"share": 0.1}),
    "ten": lambda seconds: _many(seconds / 2, python=10, sql=1),
    "four": lambda seconds: _many(seconds, python=1, sql=1, docs=2),
    "straggler": lambda seconds: (
        *_many(seconds, python=1, sql=1, docs=1),
        WorkerPlan(name="docs1", domain="docs_expert", stop_s=seconds, speed=0.25),
    ),
}


def _main(rows: int, seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        yield Run(scheme="apart", seed=seed, rows=rows)
        for gain in (2.0, 1.0, 3.0):
            yield Run(scheme="gateway", gain=gain, seed=seed, rows=rows)
        yield Run(scheme="central", seed=seed, rows=rows)


def _shared(rows: int, seeds: int) -> Iterator[Run]:
    """The ways to share a worker's compute between gateway and expert."""
    for seed in range(seeds):
        yield Run(scheme="turns", gain=2.0, seed=seed, rows=rows)
        yield Run(scheme="residual", gain=2.0, compute=2.0, seed=seed, rows=rows)
        yield Run(scheme="turns", gain=2.0, compute=2.0, seed=seed, rows=rows)
        yield Run(scheme="twice", gain=2.0, compute=2.0, seed=seed, rows=rows)
        yield Run(scheme=ONE_PASS, gain=2.0, seed=seed, rows=rows)
        yield Run(scheme=BLOCKS, seed=seed, rows=rows)


def _lengths(rows: int, seeds: int) -> Iterator[Run]:
    for steps, sync_s in ((24, 6.0), (144, 12.0), (384, 12.0)):
        for seed in range(seeds):
            for scheme, gain in (("apart", 1.0), ("gateway", 2.0), ("central", 1.0)):
                yield Run(scheme=scheme, gain=gain, steps=steps, sync_s=sync_s, seed=seed, rows=rows)


def _ranks(rows: int, seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        for scheme, gain in (("apart", 1.0), ("gateway", 2.0), ("central", 1.0)):
            yield Run(scheme=scheme, gain=gain, rank=16, seed=seed, rows=rows)


def _six(rows: int, seeds: int) -> Iterator[Run]:
    """Six domains, each half of the sources of one of the three."""
    for seed in range(seeds):
        for scheme, gain in (
            ("apart", 1.0), ("gateway", 2.0), ("gateway", 3.0), ("gateway", 1.0), ("central", 1.0),
        ):  # fmt: skip
            yield Run(scheme=scheme, mix="six", gain=gain, seed=seed, rows=rows)


def _real(rows: int, seeds: int) -> Iterator[Run]:
    """Real processes: the interval of a new gateway, ten and five seconds between two updates."""
    rules = NEW_GATEWAY.aggregation
    for seed in range(seeds):
        yield Run(scheme="apart", merges=False, seed=seed, rows=rows)
        for sync_s in dict.fromkeys((NEW_GATEWAY.sync_interval_s, 10.0, 5.0)):
            yield Run(
                scheme="real", gain=rules.gain, balance=rules.balance, sync_s=sync_s, seed=seed, rows=rows
            )


def _formats(rows: int, seeds: int) -> Iterator[Run]:
    """What the wire format costs the gateway."""
    for seed in range(seeds):
        yield Run(scheme="gateway", gain=2.0, wire_format="fp32", seed=seed, rows=rows)


def _optimizers(rows: int, seeds: int) -> Iterator[Run]:
    """The server's rule with a state, and a shorter or longer way to the next update."""
    for seed in range(seeds):
        for gain, momentum in ((1.0, 0.5), (1.5, 0.3), (2.0, 0.3)):
            yield Run(
                scheme="gateway", gain=gain, optimizer=NESTEROV, momentum=momentum, seed=seed, rows=rows
            )
        for lr in (5e-4, 1e-3, 2e-3):
            yield Run(scheme="gateway", optimizer=ADAPTIVE, lr=lr, seed=seed, rows=rows)
        for sync_s in (3.0, 12.0):
            yield Run(scheme="gateway", gain=2.0, sync_s=sync_s, seed=seed, rows=rows)


def _opt_out(rows: int, seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        yield Run(scheme="gateway", gain=2.0, without="sql_expert", seed=seed, rows=rows)


def _time(rows: int, seeds: int) -> Iterator[Run]:
    """Time to a loss: four workers at their own pace, or in rounds; one of them may be four times slower.

    Rounds of alike workers and rounds with a straggler go through the same weights, so they are trained once.
    """
    rows = min(rows, TRACE_ROWS)
    for seed in range(seeds):
        yield Run(scheme="apart", merges=False, seed=seed, rows=rows)
        for mix in ("four", "straggler"):
            yield Run(
                scheme="gateway", mix=mix, gain=2.0, balance=BY_DOMAIN, trace=True, seed=seed, rows=rows
            )
        for gain in (1.0, 2.0):
            for steps in (3.0, 6.0, 12.0):
                yield Run(
                    scheme="rounds", mix="four", gain=gain, sync_s=steps, trace=True, seed=seed, rows=rows
                )


def _mixes(rows: int, seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        for mix in ("eight", "slow", "late", "stops", "rows", "ten"):
            for scheme, gain in (("apart", 1.0), ("gateway", 1.0), ("gateway", 2.0), ("gateway", 3.0)):
                yield Run(scheme=scheme, mix=mix, gain=gain, seed=seed, rows=rows)
            yield Run(scheme="gateway", mix=mix, gain=2.0, balance=BY_DOMAIN, seed=seed, rows=rows)
            if mix in ("eight", "ten"):  # several workers of one expert: the gain changes the experts too
                yield Run(scheme="apart", mix=mix, gain=2.0, seed=seed, rows=rows)


def _short(rows: int, seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        for scheme, gain in (("apart", 1.0), ("gateway", 2.0), ("turns", 2.0), ("central", 1.0)):
            yield Run(scheme=scheme, gain=gain, seed=seed, rows=rows)


def _tiny(rows: int, seeds: int) -> Iterator[Run]:
    """A test of the harness."""
    for seed in range(seeds):
        for scheme in ("apart", "residual"):
            yield Run(scheme=scheme, steps=2, seed=seed, rows=rows)


PARTS: dict[str, Callable[[int, int], Iterator[Run]]] = {
    "tiny": _tiny,
    "short": _short,
    "main": _main,
    "shared": _shared,
    "formats": _formats,
    "optimizers": _optimizers,
    "opt_out": _opt_out,
    "real": _real,
    "six": _six,
    "lengths": _lengths,
    "ranks": _ranks,
    "mixes": _mixes,
    "time": _time,
}
