"""fedmoe.protocol.spec: the spec survives its JSON, names itself by a digest, and refuses what cannot work."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.errors import FedMoEError, ProtocolError, SettingsError, SpecError
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import SPEC_FORMAT, Spec
from tests.errors import raises
from tests.strategies import lora_layout, specs

Q, V = "base_model.model.layers.0.q_proj", "base_model.model.layers.0.v_proj"
PLAIN = Spec(
    base_model="base",
    base_config={"hidden_size": 64},
    layout=lora_layout({Q: (8, 8), V: (4, 8)}, 16),
    lora=LoraSettings(rank=16, alpha=32.0),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(specs())
def test_a_spec_survives_json(spec: Spec) -> None:
    """from_json(to_json(s)) == s, with the same text and digest."""
    again = Spec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.digest == spec.digest
    assert len(spec.digest) == 16


def test_the_json_is_canonical() -> None:
    """The order in which a config's numbers were read does not change the digest."""
    one, other = (
        dataclasses.replace(PLAIN, base_config=dict(c)) for c in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])
    )
    assert one.to_json() == other.to_json()


@given(specs(), specs())
def test_the_digest_tells_specs_apart(one: Spec, other: Spec) -> None:
    """Two specs have one digest only if they are equal."""
    assert (one.digest == other.digest) == (one == other)


@given(st.text(max_size=50) | st.binary(max_size=50) | json_values.map(json.dumps))
@example("[" * 100_000)
@example("9" * 5000)
def test_garbage_is_a_spec_error(text: str | bytes) -> None:
    """Anything that is not a spec raises SpecError and nothing else."""
    with pytest.raises(SpecError):
        Spec.from_json(text)


@given(st.sampled_from(sorted(json.loads(PLAIN.to_json()))), json_values)
@example("lora", {"rank": 1, "alpha": 10**400, "targets": []})
@example("layout", [["a", [1]], ["a", [1]]])
def test_an_odd_field_is_refused_or_harmless(field: str, value: object) -> None:
    """Whatever stands in a field of the stored spec: a usable spec, or one of FedMoE's own errors."""
    content = json.loads(PLAIN.to_json()) | {field: value}
    with contextlib.suppress(FedMoEError):
        spec = Spec.from_json(json.dumps(content))
        assert Spec.from_json(spec.to_json()).digest == spec.digest


@pytest.mark.parametrize(
    ("settings", "bad", "about"),
    [
        (LoraSettings, {"rank": 0}, "rank"),
        (LoraSettings, {"rank": 2.5}, "rank"),
        (LoraSettings, {"rank": True}, "rank"),
        (LoraSettings, {"alpha": -1.0}, "alpha"),
        (LoraSettings, {"alpha": float("nan")}, "alpha"),
        (LoraSettings, {"targets": ()}, "targets"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: type, bad: dict[str, Any], about: str) -> None:
    """By the name of the setting."""
    with raises(SettingsError, about=about):
        settings(**bad)


@pytest.mark.parametrize(
    ("bad", "about"),
    [
        ({"base_model": ""}, "base_model"),
        ({"wire_format": "int2"}, "wire_format"),
        ({"init_seed": -1}, "init_seed"),
        ({"layout": Layout.of([("a", (2**30,))])}, "layout"),
    ],
)
def test_specs_that_cannot_work_are_refused(bad: dict[str, Any], about: str) -> None:
    """A spec refuses at its creation, not at the first update."""
    with raises(SettingsError, about=about):
        dataclasses.replace(PLAIN, **bad)


@pytest.mark.parametrize(
    ("step", "remedy"),
    [(1, "upgrade the FedMoE on this machine"), (-1, "serve the expert with the FedMoE that made it")],
)
def test_another_format_is_refused(step: int, remedy: str) -> None:
    """A spec of a later FedMoE is not half understood, nor is that of an earlier one."""
    other = SPEC_FORMAT + step
    with pytest.raises(
        ProtocolError,
        match=f"has format {other}, the FedMoE on this machine reads format {SPEC_FORMAT}: {remedy}",
    ):
        Spec.from_json(PLAIN.to_json().replace(f'"spec_format":{SPEC_FORMAT}', f'"spec_format":{other}'))


def test_adapter_config_keeps_the_scaling_at_any_rank() -> None:
    """The scaling alpha / r is the spec's for the expert's own rank and for the gateway's."""
    own, gateway = PLAIN.adapter_config(), PLAIN.adapter_config(rank=48)
    assert (own["r"], own["lora_alpha"]) == (16, 32.0)
    assert (gateway["r"], gateway["lora_alpha"]) == (48, 96.0)
    assert gateway["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("alpha", "rank", "other", "text"), [(32.0, 16, 48, "96"), (7.0, 49, 49, "7"), (4.0, 5, 3, "2.4")]
)
def test_alpha_is_whole_where_it_is_one(alpha: float, rank: int, other: int, text: str) -> None:
    """Also where alpha / rank is no exact binary number; a reader that takes integers only reads `96.0` not."""
    spec = dataclasses.replace(PLAIN, lora=dataclasses.replace(PLAIN.lora, alpha=alpha, rank=rank))
    assert json.dumps(spec.adapter_config(rank=other)["lora_alpha"]).startswith(text)
    assert ("." in text) == isinstance(spec.adapter_config(rank=other)["lora_alpha"], float)
