"""Configs: they survive JSON, keep their types, and answer any nonsense with one InputError."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from strategies import NONSENSE, changed_json, fuzz, or_input_error, values

from jaxngp.config import (
    HashGridConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    SceneConfig,
    StratifiedConfig,
    apply_overrides,
    differences,
    from_json,
    to_json,
)
from jaxngp.presets import PRESETS, SCENES, scene_config

# The first text that is drawn builds a table of all of Unicode, which takes seconds.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, value and declared type of every field that is not a group."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        child, name = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(child):
            yield from leaves(child, name)
        else:
            yield name, child, hints[field.name]


PATHS = sorted({path for preset in PRESETS.values() for path, _, _ in leaves(preset)})


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type; many are outside the range of the field, so that a config refuses them."""
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.tuples(*map(values_of, typing.get_args(kind)))
    powers = st.integers(0, 20).map(lambda exponent: 2**exponent)
    return {
        bool: st.booleans(),
        int: powers | st.integers(0, 64),
        float: st.floats(0, 4) | st.floats(-1e300, 1e300, exclude_min=True, exclude_max=True),
        str: st.text(min_size=1),
    }[kind]


@st.composite
def configs(draw: st.DrawFn) -> NerfConfig:
    """A preset of which a few fields have other values."""
    result = draw(st.sampled_from(list(PRESETS.values())))
    for _ in range(draw(st.integers(0, 4))):
        path, _, kind = draw(st.sampled_from(list(leaves(result))))
        changed = _changed(result, path.split("."), draw(values_of(kind)))
        assume(changed is not None)
        result = typing.cast(NerfConfig, changed)
    return result


def _changed(value: Any, names: list[str], leaf: Any) -> Any:
    """`value` with one leaf replaced, or None where the config refuses it."""
    new = _changed(getattr(value, names[0]), names[1:], leaf) if len(names) > 1 else leaf
    try:
        return None if new is None else dataclasses.replace(value, **{names[0]: new})
    except InputError:
        return None


@presets
def test_a_preset_survives_json_and_is_a_cache_key(preset: NerfConfig) -> None:
    assert from_json(to_json(preset)) == preset
    assert hash(from_json(to_json(preset))) == hash(preset)


@relaxed
@given(configs())
def test_a_config_survives_json(value: NerfConfig) -> None:
    back = from_json(to_json(value))
    assert back == value
    assert [type(leaf) for _, leaf, _ in leaves(back)] == [type(leaf) for _, leaf, _ in leaves(value)]
    assert not differences(value, back)


@relaxed
@given(configs(), configs())
def test_differences_are_the_leaves_that_differ(old: NerfConfig, new: NerfConfig) -> None:
    a, b = ({path: leaf for path, leaf, _ in leaves(value)} for value in (old, new))
    expected = {path for path in a | b if a.get(path) != b.get(path)}
    found = {line.split(":")[0] for line in differences(old, new)}
    assert {path for path in found if not path.endswith(".type")} == expected
    assert ("sampler.type" in found) == (type(old.sampler) is not type(new.sampler))


@relaxed
@given(configs(), st.data())
def test_an_override_sets_one_leaf(value: NerfConfig, data: st.DataObject) -> None:
    path, _, kind = data.draw(st.sampled_from(list(leaves(value))))
    leaf = data.draw(values_of(kind))
    text = leaf if isinstance(leaf, str) else json.dumps(leaf)
    assume(text == text.strip())
    expected = _changed(value, path.split("."), leaf)
    if expected is not None:
        assert apply_overrides(value, [f"{path}={text}"]) == expected
    else:
        with pytest.raises(InputError):
            apply_overrides(value, [f"{path}={text}"])


@presets
def test_overrides_keep_the_type(preset: NerfConfig) -> None:
    result = apply_overrides(preset, ["optimizer.learning_rate=1", "train.seed=2**10", "field.use_bias=TRUE"])
    assert (result.optimizer.learning_rate, result.train.seed, result.field.use_bias) == (1.0, 1024, True)
    assert type(result.optimizer.learning_rate) is float
    for path, leaf, _ in leaves(preset):
        assert type(leaf) is type({p: v for p, v, _ in leaves(result)}[path])


def test_a_tuple_is_given_as_a_list() -> None:
    result = apply_overrides(NerfConfig(), ["scene.box_centre=[1, 0, -0.5]"])
    assert result.scene.box_centre == (1.0, 0.0, -0.5)


def test_the_last_override_wins_and_spaces_do_not_matter() -> None:
    assert apply_overrides(NerfConfig(), ["train.seed=1", " train.seed = 2 "]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "no field 'sed'; its fields are background, .*seed, steps_per_dispatch"),
        ("tran.seed=1", "no field 'tran'; its fields are field, optimizer, sampler, scene, train"),
        ("train=1", "names a group; its fields are background, "),
        ("train.seed.low=1", "'seed' is a value and has no fields"),
        ("train.seed", "expected dotted.path=value"),
        ("train.seed=1.5", "train.seed = 1.5: expected int"),
        ("train.seed=true", "expected int"),
        ("train.seed=2**65", "expected int"),
        ("optimizer.beta1=NaN", "expected float"),
        ("optimizer.beta1=1e999", "expected float"),
        ("train.loss=l1", "expected one of 'huber', 'l2'"),
        ("field.use_bias=1", "expected bool"),
        ("scene.box_centre=[1, 2]", "a list of 3 values"),
        ("field.encoding.table_size=1000", "a power of two"),
        ("sampler.num_bins=5", "no field 'num_bins'"),
    ],
)
def test_a_wrong_override_says_what_is_right(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        apply_overrides(NerfConfig(), [override])
    assert "\n" not in str(caught.value)


@fuzz
@given(st.sampled_from(PATHS) | st.text(), st.text() | values.map(json.dumps) | values.map(str))
@example("train.max_steps", "9" * 5000)
@example("train.max_steps", "[" * 100_000)
def test_a_hostile_override_is_an_input_error(path: str, text: str) -> None:
    result = or_input_error(lambda: apply_overrides(NerfConfig(), [f"{path}={text}"]))
    assert result is None or from_json(to_json(result)) == result


@fuzz
@given(st.text() | NONSENSE.map(json.dumps))
@example("[" * 100_000)
@example("[" * 900 + "]" * 900)
@example("NaN")
@example('{"scene": {}, "scene": 1}')
def test_hostile_json_is_an_input_error(text: str) -> None:
    assert or_input_error(lambda: from_json(text)) is None


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: apply_overrides(NerfConfig(), ["train.max_steps=" + "9" * 99 + "**64"]),
        lambda: from_json('{"scene": ' + "9" * 5000 + "}"),
    ],
    ids=["override", "json"],
)
def test_an_endless_number_is_an_input_error(attempt: Callable[[], NerfConfig]) -> None:
    try:
        to_json(attempt())
    except InputError:
        return
    pytest.fail("accepted")


@fuzz
@given(st.sampled_from([json.loads(to_json(preset)) for preset in PRESETS.values()]).flatmap(changed_json))
def test_json_with_a_few_nodes_changed_is_a_config_or_an_input_error(plain: Any) -> None:
    result = or_input_error(lambda: from_json(json.dumps(plain)))
    assert result is None or from_json(to_json(result)) == result


def test_json_names_what_is_missing_or_unknown() -> None:
    plain = json.loads(to_json(NerfConfig()))
    with pytest.raises(InputError, match=r"config: 'train' is missing"):
        from_json(json.dumps({k: v for k, v in plain.items() if k != "train"}))
    with pytest.raises(InputError, match=r"config: no field 'extra'; its fields are field, "):
        from_json(json.dumps(plain | {"extra": 1}))
    with pytest.raises(InputError, match=r"^sampler.type = 'Dense': expected one of MarchConfig, Strat"):
        from_json(json.dumps(plain | {"sampler": plain["sampler"] | {"type": "Dense"}}))


def test_the_kinds_of_sampler_are_told_apart() -> None:
    for sampler in (MarchConfig(), StratifiedConfig()):
        assert from_json(to_json(NerfConfig(sampler=sampler))).sampler == sampler


def test_a_part_of_a_config_has_json_of_its_own() -> None:
    assert from_json(to_json(SCENES["lego"]), SceneConfig) == SceneConfig(name="lego")


def test_scenes_by_name_and_by_path() -> None:
    assert scene_config("lego") is SCENES["lego"]
    assert scene_config("./lego").name == "./lego"
    with pytest.raises(InputError, match=r"unknown scene 'leg': give one of bricks, chair, .*or a path"):
        scene_config("leg")


def test_derived_values() -> None:
    assert HashGridConfig().num_outputs == 32
    assert MarchConfig(num_steps=1024).step_size * 1024 == pytest.approx(3**0.5)
