"""The one home of hypothesis strategies: values as FedMoE makes them, and as nobody should send them."""

import random
from typing import Any

import msgpack
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from consumers.gateway.merge import MergeInput
from fedmoe.protocol.formats import FORMATS
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import ALL_LINEAR, LoraSettings
from fedmoe.protocol.rules import SERVER_OPTIMIZERS, AggregationRules, RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import KINDS, Decay
from fedmoe.protocol.update import Header, Part, UpdateId, make_run

# How long one example takes says nothing on a shared machine; pytest's own timeout bounds each test.
settings.register_profile("fedmoe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedmoe")

NAME_CHARS = "ABCXYZabcxyz019_-"
MAX_COUNT = 2**53
seeds = st.integers(0, 2**32 - 1)
wire_formats = st.sampled_from(sorted(FORMATS))


def names() -> st.SearchStrategy[str]:
    """Valid names of workers and experts."""
    inner = st.text(NAME_CHARS + ".", max_size=62)
    end = st.sampled_from(NAME_CHARS)
    return st.one_of(end, st.builds("".join, st.tuples(end, inner, end)))


def decays() -> st.SearchStrategy[Decay]:
    """Decay functions of every kind."""
    size = st.floats(0, 1e6)
    return st.builds(Decay, kind=st.sampled_from(KINDS), a=size, b=size)


def randn(seed: int, *shape: int) -> torch.Tensor:
    """A tensor of standard normal fp32 values that depends on nothing but its arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flats(
    size: st.SearchStrategy[int], *, exponents: tuple[int, int] = (-6, 6)
) -> st.SearchStrategy[torch.Tensor]:
    """Flat fp32 vectors (n,): normal values at a magnitude of 10 to some power, some of them zero."""

    def build(seed: int, n: int, exponent: int, sparse: bool) -> torch.Tensor:
        flat = randn(seed, n) * 10.0**exponent
        return flat * (randn(seed + 1, n) > 0) if sparse else flat

    return st.builds(build, seeds, size, st.integers(*exponents), st.booleans())


def layouts() -> st.SearchStrategy[Layout]:
    """Small layouts of any names and shapes."""
    shapes = st.lists(st.integers(1, 4), max_size=3)
    tensor_names = st.text(max_size=12).filter("__metadata__".__ne__)
    return st.dictionaries(tensor_names, shapes, min_size=1, max_size=6).map(lambda d: Layout.of(d.items()))


@st.composite
def lora_dims(draw: st.DrawFn) -> dict[str, tuple[int, int]]:
    """Modules of a small model: name -> (out, in) features, as PEFT names them."""
    modules = draw(st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1, unique=True))
    size = st.integers(1, 9)
    return {f"base_model.model.layers.0.{module}": (draw(size), draw(size)) for module in modules}


def lora_layout(dims: dict[str, tuple[int, int]], rank: int) -> Layout:
    """The layout of a LoRA adapter of these modules: A (rank, in) and B (out, rank) each."""
    factors = []
    for module, (m, n) in dims.items():
        factors += [(f"{module}.lora_A.weight", (rank, n)), (f"{module}.lora_B.weight", (m, rank))]
    return Layout.of(factors)


def random_expert(
    seed: int, dims: dict[str, tuple[int, int]], rank: int, *, scaling: float = 2.0, weight: float = 1.0
) -> MergeInput:
    """An expert of random values in both factors."""
    layout = lora_layout(dims, rank)
    return MergeInput(layout=layout, flat=randn(seed, layout.numel), scaling=scaling, weight=weight)


@st.composite
def families(draw: st.DrawFn, *, same_rank: bool = False) -> list[MergeInput]:
    """One to four experts of one model, each of its own scaling, weight and (unless `same_rank`) rank."""
    dims = draw(lora_dims())
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    if same_rank:
        ranks = [ranks[0]] * len(ranks)
    size = st.floats(0.1, 10)
    return [random_expert(draw(seeds), dims, rank, scaling=draw(size), weight=draw(size)) for rank in ranks]


def specs() -> st.SearchStrategy[Spec]:
    """Specs of any valid settings."""
    positive = st.floats(1e-6, 1e6)
    count = st.integers(1, 1000)
    return st.builds(
        Spec,
        base_model=st.text(min_size=1, max_size=20),
        base_config=st.dictionaries(
            st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5)), max_size=3
        ),
        layout=layouts(),
        lora=st.builds(
            LoraSettings,
            rank=count,
            alpha=positive,
            targets=st.sampled_from([(ALL_LINEAR,), ("q_proj", "v_proj")]),
        ),
        wire_format=wire_formats,
        init_seed=seeds,
    )


def rule_sets() -> st.SearchStrategy[RuleSet]:
    """Rule sets of any valid settings."""
    positive = st.floats(1e-6, 1e6)
    count = st.integers(1, 1000)
    return st.builds(
        RuleSet,
        number=count,
        aggregation=st.builds(
            AggregationRules,
            lr=st.floats(1e-6, 1e3),
            decay=decays(),
            gain=st.floats(1e-3, 10),
            server_optimizer=st.sampled_from(SERVER_OPTIMIZERS),
            server_momentum=st.floats(0, 0.999),
            max_staleness=st.none() | st.integers(0, 1000),
            max_norm=positive,
        ),
        training=st.builds(
            TrainingSettings,
            learning_rate=st.floats(1e-6, 1e3),
            batch_size=count,
            max_length=st.integers(8, 999),
        ),
        sync_interval_s=st.floats(1e-6, 86_400),
    )


def update_ids() -> st.SearchStrategy[UpdateId]:
    """Names of updates."""
    nonce = st.text("0123456789abcdef", min_size=8, max_size=8)
    runs = st.builds(make_run, st.integers(0, 10**12 - 1), nonce)
    return st.builds(UpdateId, runs, st.integers(1, MAX_COUNT))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Headers that a correct worker may write."""
    run, seq = draw(update_ids())
    count = st.integers(0, MAX_COUNT)
    text = st.text(max_size=30)
    parts = st.builds(
        Part,
        st.integers(1, 2**20),
        st.sampled_from([16, 32]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    )
    return Header(
        lineage=draw(text),
        spec=draw(text),
        run=run,
        seq=seq,
        prev=draw(st.none() | update_ids()),
        base_version=draw(count),
        wire_format=draw(wire_formats),
        base_fingerprint=draw(text),
        n_examples=draw(count),
        n_tokens=draw(count),
        steps=draw(count),
        loss=draw(st.floats(allow_nan=False)),
        position=draw(text),
        parts=tuple(draw(st.lists(parts, max_size=3))),
        vector=(vector := draw(st.none() | st.binary(max_size=32))),
        vector_rows=0 if vector is None else draw(count),
    )


def oddities() -> st.SearchStrategy[Any]:
    """Values that msgpack can carry and nobody asked for, nested a few levels deep."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=8),
        st.binary(max_size=40),
        st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
        st.builds(msgpack.Timestamp, st.integers(0, 2**34), st.integers(0, 10**9 - 1)),
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4)
        ),
        max_leaves=8,
    )


def flip_bytes(data: bytes, seed: int, flips: int) -> bytes:
    """`data` with so many bytes set to random values, cut short or made longer now and then."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(flips):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    if rng.random() < 0.2:
        del damaged[rng.randrange(len(damaged)) :]
    if rng.random() < 0.2:
        damaged += rng.randbytes(rng.randrange(64))
    return bytes(damaged)
