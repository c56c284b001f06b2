"""Ray tables: three kinds of file hold the same rays, and nothing that a file asks for is done."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import fuzz

from jaxngp import data
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import rays

WIDTH, HEIGHT = 4, 2
BOX = SceneConfig(name="-", box_centre=(0.5, 0.0, -1.0), box_side=2.0)


def rows(num_views: int, seed: int = 0) -> np.ndarray:
    """Views of 4x2 rays as the reference has them: (N, 9) f32, directions of any length."""
    rng = np.random.default_rng(seed)
    count = num_views * WIDTH * HEIGHT
    return np.concatenate([rng.normal(size=(count, 6)), rng.uniform(size=(count, 3))], axis=1).astype(np.float32)


def scene_at(path: Path) -> SceneConfig:
    return replace(BOX, name=str(path))


def table(split: data.Split) -> data.RayTable:
    assert isinstance(split.images, data.RayTable)
    return split.images


def message(call: Callable[[SceneConfig], object], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        call(scene_at(path))
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)
    return str(caught.value)


def save(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, rays=array)
    elif path.suffix == ".pkl":
        array.dump(path)  # as the reference's tables were written
    else:
        np.save(path, array)
    return path


# What is read.


@pytest.mark.parametrize("suffix", rays.SUFFIXES)
def test_rays_come_back_in_scene_units(tmp_path: Path, suffix: str) -> None:
    array = rows(2)
    save(tmp_path / f"test_4x2{suffix}", rows(1))
    split = data.load_training(scene_at(save(tmp_path / f"train_4x2{suffix}", array)))
    found = table(split)
    np.testing.assert_allclose(found.rays.origin, (array[:, :3] - BOX.box_centre) / 2 + 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.rays.direction, axis=1), 1, rtol=1e-6)
    length = np.linalg.norm(array[:, 3:6], axis=1, keepdims=True)
    np.testing.assert_allclose(found.rays.direction * length, array[:, 3:6], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.rgb, array[:, 6:])
    arrays = (found.rays.origin, found.rays.direction, found.rgb)
    assert {(type(a).__name__, str(a.dtype), a.shape) for a in arrays} == {("ndarray", "float32", (16, 3))}
    assert split.views == ("view_0", "view_1")
    assert split.resolution == (WIDTH, HEIGHT)
    assert not split.has_alpha


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_every_pickle_of_an_array_is_read(tmp_path: Path, protocol: int, dtype: str, order: str) -> None:
    array = rows(1).astype(dtype)
    array = array.repeat(2, axis=1)[:, ::2] if order == "strided" else np.asarray(array, order=order)  # type: ignore[call-overload]
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps(array, protocol=protocol))
    found, size = rays.read_ray_table(path)
    np.testing.assert_array_equal(found, array)
    assert size == (0, 0)
    # The name that numpy's modules had until 2.0 is the one in the reference's files.
    if protocol == 2:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
        np.testing.assert_array_equal(rays.read_ray_table(path)[0], array)


def test_the_kind_of_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    save(tmp_path / "train.npy", rows(1)).rename(tmp_path / "train.pkl")
    np.testing.assert_array_equal(rays.read_ray_table(tmp_path / "train.pkl")[0], rows(1))


def test_an_npz_holds_its_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", anything=rows(3), size=np.array([WIDTH, HEIGHT]))
    assert data.load_training(scene_at(tmp_path / "train.npz")).num_views == 2
    assert data.load_evaluation(scene_at(tmp_path / "train.npz")).views == ("view_0",)
    np.savez(tmp_path / "train.npz", rays=rows(3), size=np.array([0, 2]))
    assert "'size'" in message(data.load_training, tmp_path / "train.npz")


def test_long_tables_are_converted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "train.npy", rows(5))
    whole = table(data.load_training(scene_at(path)))
    monkeypatch.setattr(rays, "CHUNK", 7)
    parts = table(data.load_training(scene_at(path)))
    np.testing.assert_array_equal(whole.rays.origin, parts.rays.origin)
    np.testing.assert_array_equal(whole.rgb, parts.rgb)


# Splits.


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("training_data_4x2.pkl", "testing_data_4x2.pkl", "test"),
        ("train_4x2.npy", "val_4x2.npy", "val"),
        ("train-a_4x2.npz", "validation-a_4x2.npy", "val"),
    ],
)
def test_a_sibling_is_found_by_its_name(tmp_path: Path, train: str, other: str, split: str) -> None:
    save(tmp_path / train, rows(2))
    save(tmp_path / other, rows(4, seed=1))
    save(tmp_path / "test_of_something_else_4x2.npy", rows(1)).rename(tmp_path / "testament.npy")
    for path in (tmp_path / train, tmp_path):
        assert data.locate(scene_at(path)).splits == ("train", split)
        assert data.load_training(scene_at(path)).num_views == 2
        evaluation = data.load_evaluation(scene_at(path), num_views=2)
        assert (evaluation.name, evaluation.views) == (split, ("view_0", "view_2"))
        np.testing.assert_array_equal(
            table(evaluation).rgb, rows(4, seed=1).reshape(4, 8, 9)[::2, :, 6:].reshape(-1, 3)
        )


def test_a_table_of_any_name_is_a_train_table(tmp_path: Path) -> None:
    path = save(tmp_path / "rays_4x2.npy", rows(9))
    assert data.load_training(scene_at(path)).num_views == 7
    held_out = data.load_evaluation(scene_at(path))
    assert (held_out.name, held_out.views) == ("held-out", ("view_0", "view_8"))
    np.testing.assert_array_equal(table(held_out).rgb[8:], rows(9)[64:, 6:])


def test_a_test_table_alone_can_only_be_evaluated(tmp_path: Path) -> None:
    path = save(tmp_path / "test_4x2.npy", rows(1))
    assert data.load_evaluation(scene_at(path)).name == "test"
    assert "no 'train' split" in message(data.load_training, path)


def test_two_tables_of_one_split_are_said(tmp_path: Path) -> None:
    for name in ("train_a.npy", "train_b.npy"):
        save(tmp_path / name, rows(1))
    assert "train_a.npy and train_b.npy" in message(data.load_training, tmp_path)


def test_without_a_size_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    path = save(tmp_path / "train.npy", rows(2))
    split = data.load_training(scene_at(path))
    assert (split.num_views, split.resolution, len(table(split).rgb)) == (0, (0, 0), 16)
    assert "WIDTHxHEIGHT" in message(data.load_evaluation, path)


def test_rows_that_make_no_whole_views_are_said(tmp_path: Path) -> None:
    path = save(tmp_path / "train_4x2.npy", rows(2)[:-1])
    assert "15 rows are not a whole number of 4x2 views" in message(data.load_training, path)


def test_a_table_is_not_downscaled(tmp_path: Path) -> None:
    path = save(tmp_path / "train.npy", rows(2))
    with pytest.raises(InputError, match=r"scene\.downscale = 2"):
        data.load_training(replace(scene_at(path), downscale=2))


# What is wrong.


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, np.nan, "not finite"),
        (4, np.inf, "not finite"),
        (8, -np.inf, "not finite"),
        (2, np.uint32(0x7FA00000).view(np.float32), "not finite"),  # a signalling NaN
        (1, 1e30, "not finite"),
        (slice(3, 6), 0, "no direction"),
        (7, 1.1, "colour outside"),
        (7, -0.1, "colour outside"),
    ],
)
def test_an_unsound_row_is_named(tmp_path: Path, column: int | slice, value: float, said: str) -> None:
    array = rows(2)
    array[13, column] = value
    text = message(data.load_training, save(tmp_path / "train.npy", array))
    assert f"row 13 {'has' if 'not' not in said else 'is'}" in text
    assert said in text


@pytest.mark.parametrize("suffix", rays.SUFFIXES)
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 8)),
        np.zeros((0, 9)),
        np.zeros(9),
        np.ones((4, 9), np.uint8),
        np.array([["a"] * 9]),
        np.array([[None] * 9]),
        np.zeros((4, 9), np.complex64),
        np.zeros((4, 9), "f4,O"),
    ],
    ids=["8 columns", "empty", "flat", "integers", "text", "objects", "complex", "records"],
)
def test_another_array_is_refused(tmp_path: Path, suffix: str, array: np.ndarray) -> None:
    message(data.load_training, save(tmp_path / f"train{suffix}", array))


@pytest.mark.parametrize("suffix", rays.SUFFIXES)
@pytest.mark.parametrize("keep", [0, 1, 5, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = save(tmp_path / f"train{suffix}", rows(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    message(data.load_training, path)


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(10**6, 9), (10**13, 9), (2**62, 9), (-1, 9)])
def test_a_shape_larger_than_the_file_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "train.npy").write_bytes(npy_header(shape) + bytes(100))
    message(data.load_training, tmp_path / "train.npy")
    with zipfile.ZipFile(tmp_path / "test.npz", "w") as archive:
        archive.writestr("rays.npy", npy_header(shape) + bytes(100))
    message(data.load_evaluation, tmp_path / "test.npz")


def test_an_archive_bomb_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "train.npz", rays=np.zeros((10**6, 9), np.float32))
    assert "refused" in message(data.load_training, tmp_path / "train.npz")


def test_an_archive_without_a_table_says_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", origins=np.zeros((4, 3)), a=rows(1), b=rows(1))
    assert "origins (4, 3)" in message(data.load_training, tmp_path / "train.npz")


# Pickles that are more than an array.

RAN: list[str] = []


def note(text: str) -> str:
    RAN.append(text)
    return text


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    for payload in (Calls(os.system, f"touch {tmp_path}/ran"), Calls(note, "x"), Calls(eval, "RAN.append(1)")):
        for holder in (payload, np.array([payload, payload]), (rows(1), payload)):
            (tmp_path / "train.pkl").write_bytes(pickle.dumps(holder, protocol=protocol))
            assert "refused" in message(data.load_training, tmp_path / "train.pkl")
    assert not RAN
    assert not (tmp_path / "ran").exists()


def test_a_refused_pickle_says_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Calls(os.system, "true")))
    text = message(data.load_training, tmp_path / "train.pkl")
    assert f"refused: the pickle asks for '{os.system.__module__}.system'" in text


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([1, 2]),
        pickle.dumps({"rays": rows(1)}),
        pickle.dumps(None),
        pickle.dumps(np.float32(1)),
        pickle.dumps(np.ma.masked_array(rows(1))),
        b"r\xff\xff\xff\x7f.",  # a memo index that costs the unpickler in C 34 GB
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"x.",  # a bytearray of 64 GB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"x.",  # a frame of 1 TB
        b"(" * 100_000 + b"t" * 100_000 + b".",  # tuples 100,000 deep
        b"cnumpy\nndarray\n(I99999999999\ntR.",  # a large array made by a call
        b"cnumpy\nndarray\n}b.",
        b"cnumpy\nndarray\n(NN\x86b.",
        b"c_codecs\nencode\n(Va\nVzlib\ntR.",
        b"cnumpy\ndtype\n(Vf4\ntR.",
        b"c__builtin__\neval\n(V1\ntR.",
        b"cnumpy.core\nmultiarray._reconstruct\n.",
        b"Pid\n.",
        b"\x82\x01.",
        b"0",
        b".",
        b"cnumpy\nnd\narray\n.",
    ],
)
def test_a_hostile_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.pkl").write_bytes(content)
    message(data.load_training, tmp_path / "train.pkl")


def test_no_pickle_changes_the_names_it_may_use(tmp_path: Path) -> None:
    before = [dict(vars(named)) for named in rays._ALLOWED.values() if isinstance(named, type)]
    for named in (b"numpy\ndtype", b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct", b"_codecs\nencode"):
        state = b"N(Vsaid\nVx\nd\x86"  # (None, {...}): attributes to set
        for setting in (state, b"(Vsaid\nVx\nd"):
            (tmp_path / "train.pkl").write_bytes(b"c" + named + b"\n" + setting + b"b.")
            message(data.load_training, tmp_path / "train.pkl")
    assert [dict(vars(named)) for named in rays._ALLOWED.values() if isinstance(named, type)] == before


def check_refused_or_sound(path: Path) -> None:
    """Loads a table of which nothing is known; any exception but InputError escapes."""
    found, text = None, ""
    try:
        found = table(data.load_training(scene_at(path)))
    except InputError as error:
        text = str(error)
    assert "\n" not in text
    assert found is None or np.isfinite(found.rays.direction).all()


VALID = [pickle.dumps(rows(1), protocol=protocol) for protocol in (0, 2, 4, 5)]
PIECES = st.sampled_from(
    [opcode.code.encode("latin1") for opcode in pickletools.opcodes] + [b"cnumpy\ndtype\n", b"K\x01", b"\n"]
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A pickle of an array in which some bytes are replaced, removed or put in."""
    content = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 3))] = draw(st.one_of(st.binary(max_size=3), PIECES))
    return bytes(content)


@fuzz
@given(st.one_of(damaged(), st.lists(PIECES, max_size=30).map(b"".join), st.binary(max_size=60)))
def test_any_pickle_is_a_table_or_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.pkl"
    path.write_bytes(content)
    check_refused_or_sound(path)
