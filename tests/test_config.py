"""Configs: they survive JSON, keep their types, and answer any nonsense with one InputError."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from strategies import NONSENSE, changed_json, fuzz, or_input_error, values

from jaxngp import flags, train_image, train_sdf
from jaxngp.config import (
    IDENTITY,
    Bounds,
    Config,
    HashGridConfig,
    ImageConfig,
    ImageSourceConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    OptimizerConfig,
    Role,
    SceneConfig,
    SdfConfig,
    StepDecay,
    StratifiedConfig,
    apply_overrides,
    declared,
    differences,
    field_help,
    from_json,
    program_config,
    to_json,
)
from jaxngp.presets import PRESETS, SCENES, scene_config, suited

# The first text that is drawn builds a table of all of Unicode, which takes seconds.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


type_hints = functools.cache(typing.get_type_hints)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, value and declared type of every field that is not a group."""
    hints = type_hints(type(value))
    for field in dataclasses.fields(value):
        child, name = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(child):
            yield from leaves(child, name)
        else:
            yield name, child, hints[field.name]


def groups(value: Any) -> Iterator[Any]:
    """A config and all configs in it."""
    yield value
    for field in dataclasses.fields(value):
        if dataclasses.is_dataclass(child := getattr(value, field.name)):
            yield from groups(child)


RUNS: dict[str, Any] = {**PRESETS, "image": ImageConfig(), "sdf": SdfConfig()}
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


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_a_preset_survives_json_and_is_a_cache_key(config: Any) -> None:
    back = from_json(to_json(config), type(config))
    assert back == config
    assert hash(back) == hash(config)


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
    assert [(path, type(leaf)) for path, leaf, _ in leaves(result)] == [
        (p, type(leaf)) for p, leaf, _ in leaves(preset)
    ]


def test_a_tuple_is_given_as_a_list() -> None:
    result = apply_overrides(NerfConfig(), ["scene.box_centre=[1, 0, -0.5]"])
    assert result.scene.box_centre == (1.0, 0.0, -0.5)


def test_the_last_override_wins_whatever_its_spaces() -> None:
    assert apply_overrides(NerfConfig(), ["train.seed=1", " train.seed = 2 "]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "no field 'sed'; its fields are background, .*seed, steps_per_dispatch"),
        ("tran.seed=1", "no field 'tran'; its fields are field, optimizer, refine, sampler, scene, train"),
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
def test_changed_json_is_a_config_or_an_input_error(plain: Any) -> None:
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


def test_a_missing_value_is_its_default() -> None:
    """A run that was written before a field existed is read as what it was."""
    plain = json.loads(to_json(SceneConfig(name="lego", hold_out_every=5)))
    del plain["hold_out_every"]
    assert from_json(json.dumps(plain), SceneConfig) == SceneConfig(name="lego")


# Declarations.


@dataclasses.dataclass(frozen=True)
class Group(Config):
    low: Annotated[int, Bounds(-5, 5), "from -5 to 5"] = 0
    half: Annotated[float, Bounds(above=0, below=1), "between 0 and 1"] = 0.5
    fours: Annotated[int, Bounds(0, multiple_of=4), "a count"] = 4
    power: Annotated[int, Bounds(1, 2**20, power_of_two=True), Role.RESULT, "a size"] = 8
    word: Annotated[Literal["a", "b"], Role.FREE, "a word"] = "a"
    pair: tuple[Annotated[float, Bounds(0)], Annotated[float, Bounds(0)]] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Outer(Config):
    plain: Group = Group()
    result: Annotated[Group, Role.RESULT] = Group()

    def check(self) -> None:
        if self.plain.low > self.result.low:
            raise InputError("plain.low is larger")


@pytest.mark.parametrize(
    ("name", "good", "bad", "expected"),
    [
        ("low", [-5, 5], [-6, 6, 1.0, True, "1"], "int >= -5, <= 5"),
        ("half", [0.1, 0.9], [0.0, 1.0, float("nan"), None], "float > 0, < 1"),
        ("fours", [0, 8], [-4, 2, 2.0], "int >= 0, a multiple of 4"),
        ("power", [1, 2**20], [0, 3, 2**21, -2], "int >= 1, <= 2**20, a power of two"),
        ("word", ["a", "b"], ["c", "", 1, ["a"]], "one of 'a', 'b'"),
        ("pair", [(0, 2), [1.5, 0]], [(1,), 1, "ab", (1, 2, 3)], "a list of 2 values, each float >= 0"),
    ],
)
def test_a_value_fits_its_annotation_or_is_refused(name: str, good: list, bad: list, expected: str) -> None:
    for value in good:
        found = getattr(Group(**{name: value}), name)
        assert found == (tuple(value) if isinstance(value, list) else value)
        hash(found)
    for value in bad:
        with pytest.raises(InputError) as caught:
            Group(**{name: value})
        assert str(caught.value) == f"{name} = {value!r}: expected {expected}"


def test_an_element_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"^pair\[1\] = -1.0: expected float >= 0$"):
        Group(pair=(0, -1.0))


def test_numbers_become_what_is_declared() -> None:
    assert type(OptimizerConfig(learning_rate=1).learning_rate) is float
    assert hash(SceneConfig(box_centre=[1, 2, 3])) == hash(SceneConfig(box_centre=(1.0, 2.0, 3.0)))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: OccupancyConfig(resolution=3), "resolution"),
        (lambda: apply_overrides(OccupancyConfig(), ["resolution=3"]), "resolution"),
        (lambda: apply_overrides(NerfConfig(), ["sampler.occupancy.resolution=3"]), "sampler.occupancy.resolution"),
        (lambda: from_json(changed("sampler", "occupancy", "resolution", 3)), "sampler.occupancy.resolution"),
        (lambda: apply_overrides(NerfConfig(), ["field.encoding.init_scale=-1"]), "field.encoding.init_scale"),
        (lambda: from_json(changed("field", "encoding", "num_dims", 2)), "field.encoding.num_dims"),
        (lambda: from_json(changed("field", "direction_degree", 9)), "field.direction_degree"),
        (lambda: apply_overrides(NerfConfig(), ["train.steps_per_dispatch=2**20"]), "train.steps_per_dispatch"),
        (lambda: apply_overrides(NerfConfig(), ["scene.box_centre=[0, 0, 1e10]"]), "scene.box_centre[2]"),
    ],
)
def test_an_error_has_the_path_from_what_is_read(make: Callable[[], Any], path: str) -> None:
    """Those of a field's own bounds, and those of rules about several fields."""
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).startswith(f"{path} = ")


def changed(*path_and_value: Any) -> str:
    """The JSON of a NerfConfig with one value changed."""
    *path, last, value = path_and_value
    plain = group = json.loads(to_json(NerfConfig()))
    for name in path:
        group = group[name]
    group[last] = value
    return json.dumps(plain)


def test_overrides_must_be_valid_together_only() -> None:
    overrides = ["sampler.num_steps=4096", "sampler.num_samples=2**12"]
    for order in (overrides, overrides[::-1]):
        assert apply_overrides(NerfConfig(sampler=MarchConfig(num_samples=2048)), order).sampler.num_samples == 4096


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_help_has_an_override_for_every_leaf(config: Any) -> None:
    """As it is printed, it sets the leaf to what it is."""
    rows: dict[str, str] = {}
    for left, text in field_help(config):
        assert text
        if "=" in left:
            rows.setdefault(left.partition("=")[0], left)
    paths = [path for path in ("sampler", "optimizer.decay") if path in rows] + [path for path, _, _ in leaves(config)]
    assert apply_overrides(type(config)(), [rows[path] for path in paths]) == config


@pytest.mark.parametrize("name", PRESETS)
def test_the_help_of_a_command_has_all_of_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags.run("jaxngp.train", flags.define_train_flags, lambda _: None, "S.", ["x", "--help", f"--preset={name}"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = {words[0]: words[1:] for words in lines if words}
    assert set(PRESETS) <= set(first)
    assert {left for left, _ in field_help(PRESETS[name]) if "=" in left and " " not in left} <= set(first)
    assert first["field.hidden_width=64" if name != "small" else "field.hidden_width=32"][-3:] == ["(int", ">=", "1)"]


@pytest.mark.parametrize("define", [flags.define_train_flags, train_image.define_flags, train_sdf.define_flags])
def test_a_path_flag_expands_the_home(define: Callable[[flags.Flags], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ in --flag=~/path as it is; what only looks like a name stays one."""
    monkeypatch.setenv("HOME", "/home/ann")
    for path, meant in [
        ("~/a", "/home/ann/a"),
        ("~", "/home/ann"),
        ("./a", "./a"),
        ("a~", "a~"),
        ("~none/a", "~none/a"),
    ]:
        values = flags.Flags()
        define(values)
        mesh = ["mesh"] if define is train_sdf.define_flags else []  # elsewhere that is one of devices
        names = [name for name in ("workdir", "data_dir", "scene", "image", *mesh) if name in values]
        values(["x", *(f"--{name}={path}" for name in names)])
        assert [values[name].value for name in names] == [meant] * len(names)


def test_help_has_the_fields_of_every_choice() -> None:
    for config in (PRESETS["small"], PRESETS["hundred_lines"]):
        rows = [left for left, _ in field_help(config)]
        for path in ("sampler.num_bins", "sampler.num_steps", "optimizer.decay.factor", "optimizer.decay.final"):
            assert any(left.startswith(f"{path}=") for left in rows)


@pytest.mark.parametrize("kind", sorted({type(group) for run in RUNS.values() for group in groups(run)}, key=str))
def test_every_field_says_what_it_is(kind: type) -> None:
    assert kind.__doc__
    assert all(field.doc or field.groups for field in declared(kind))


def test_roles_are_those_of_the_groups_unless_stated() -> None:
    a = Outer()
    for group, name, value, role in [
        ("plain", "fours", 8, Role.PROGRAM),
        ("plain", "power", 16, Role.RESULT),
        ("plain", "word", "b", Role.FREE),
        ("result", "fours", 8, Role.RESULT),
        ("result", "word", "b", Role.FREE),
    ]:
        b = dataclasses.replace(a, **{group: Group(**{name: value})})
        assert [r for r in Role if differences(a, b, [r])] == [role]
        assert (program_config(a) == program_config(b)) == (role is not Role.PROGRAM)


@relaxed
@given(configs(), configs())
def test_a_program_is_shared_if_no_field_of_it_differs(old: NerfConfig, new: NerfConfig) -> None:
    a, b = program_config(old), program_config(new)
    assert (a == b) == (not differences(old, new, [Role.PROGRAM]))
    assert (hash(a) == hash(b)) or a != b
    assert program_config(a) == a
    assert not differences(a, old, [Role.PROGRAM])


def test_a_roulette_without_a_look_is_refused() -> None:
    """It would do nothing."""
    with pytest.raises(InputError, match=r"roulette.*0 where num_candidates is 0"):
        apply_overrides(PRESETS["small"], ["sampler.num_candidates=0"])


def test_what_a_compiled_program_does_not_depend_on() -> None:
    """Else a sweep over it would compile anew."""
    config = PRESETS["small"]
    other = NerfConfig(
        scene=SceneConfig("lego", "/data", 2, 100, 0, (1.0, 2.0, 3.0), 4.0),
        field=config.field,
        sampler=dataclasses.replace(
            config.sampler, occupancy=dataclasses.replace(config.sampler.occupancy, refresh_every=7)
        ),
        optimizer=OptimizerConfig(learning_rate=0.5, decay=StepDecay(factor=0.1), warmup_steps=9),
        train=dataclasses.replace(
            config.train, seed=3, max_steps=9, max_seconds=8, log_every=7, checkpoint_seconds=6, calls_in_flight=5
        ),
    )
    assert program_config(config) == program_config(other)
    for leaf in ("optimizer.ema_decay=0.5", "train.deterministic=true", "field.mlp_init=torch", "train.num_rays=64"):
        assert program_config(apply_overrides(config, [leaf])) != program_config(config)


@pytest.mark.parametrize(
    ("overrides", "identity", "budget"),
    [
        (
            ["scene.data_dir=/data", "train.checkpoint_seconds=5", "train.log_every=3", "train.calls_in_flight=2"],
            [],
            [],
        ),
        (["train.max_steps=7", "train.max_seconds=8"], [], ["train.max_seconds", "train.max_steps"]),
        (["scene.name=/elsewhere/lego"], [], []),
        (["scene.name=/data/chair"], ["scene.name"], []),
        (
            ["train.seed=1", "train.num_rays=64", "train.max_steps=7"],
            ["train.num_rays", "train.seed"],
            ["train.max_steps"],
        ),
        (["optimizer.decay=StepDecay"], ["optimizer.decay.type"], []),
    ],
)
def test_which_differences_make_another_run(overrides: list[str], identity: list[str], budget: list[str]) -> None:
    """Neither where data lies nor how a run is watched, and a budget can be extended."""
    old = dataclasses.replace(PRESETS["small"], scene=SceneConfig(name="/data/lego"))
    new = apply_overrides(old, overrides)
    found = [line.split(":")[0] for line in differences(old, new, IDENTITY)]
    assert [path for path in found if "decay" not in path or path.endswith("type")] == identity
    assert [line.split(":")[0] for line in differences(old, new, [Role.BUDGET])] == budget


def test_an_image_and_a_mesh_may_be_moved_too() -> None:
    old, new = (ImageConfig(image=ImageSourceConfig(path=f"{folder}/photo.png")) for folder in ("/a", "/b"))
    assert not differences(old, new, IDENTITY)
    old, new = (apply_overrides(SdfConfig(), [f"sdf.name={folder}/bunny.ply"]) for folder in ("/a", "/b"))
    assert not differences(old, new, IDENTITY)


def test_the_kinds_of_sampler_are_told_apart() -> None:
    for sampler in (MarchConfig(), StratifiedConfig()):
        assert from_json(to_json(NerfConfig(sampler=sampler))).sampler == sampler


def test_a_part_of_a_config_has_json_of_its_own() -> None:
    assert from_json(to_json(SCENES["lego"]), SceneConfig) == SceneConfig(name="lego", box_side=3.0)


@pytest.mark.parametrize(
    ("num_cascades", "has_alpha", "background"),
    [(1, True, "random"), (1, False, "white"), (3, True, "random"), (3, False, "random")],
)
def test_a_preset_suits_the_views(num_cascades: int, has_alpha: bool, background: str) -> None:
    """Only surroundings change how rays are marched, and only without them can the background be in the pictures."""
    config = suited(PRESETS["small"], num_cascades=num_cascades, has_alpha=has_alpha)
    assert config.train.background == background
    if num_cascades == 1:
        assert config.sampler == PRESETS["small"].sampler
        return
    assert isinstance(config.sampler, MarchConfig)
    assert config.sampler.occupancy.num_cascades == num_cascades
    assert config.sampler.occupancy.carve == has_alpha
    assert config.sampler.growth > 0


def test_surroundings_are_marched() -> None:
    with pytest.raises(InputError, match="takes no surroundings"):
        suited(PRESETS["hundred_lines"], num_cascades=2, has_alpha=False)


def test_scenes_by_name_and_by_path() -> None:
    assert scene_config("lego") is SCENES["lego"]
    assert scene_config("./lego").name == "./lego"
    with pytest.raises(InputError, match=r"unknown scene 'leg': give one of bricks, chair, .*or a path"):
        scene_config("leg")


def test_a_folder_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("desk").mkdir()
    with pytest.raises(InputError, match=r"unknown scene 'desk': for what is here .* give \./desk"):
        scene_config("desk")
    assert scene_config("./desk").name == "./desk"


def test_derived_values() -> None:
    assert HashGridConfig().num_outputs == 32
    assert MarchConfig(num_steps=1024).step_size * 1024 == pytest.approx(3**0.5)
