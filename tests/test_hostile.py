"""Broken and hostile files: what a reader answers is a sound result or one InputError, and it touches nothing else.

Valid files are changed structurally: JSON trees, the chunks of a PNG, the fields of an array's header. `JAXNGP_FUZZ`
says how many cases each test tries.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import AWKWARD, changed_bytes, changed_json, fuzz, or_input_error

from jaxngp import data
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig, SceneConfig, from_json, shown, to_json
from jaxngp.data import photos, places, splits

WIDTH, HEIGHT = 8, 4
MEMORY = 2**29  # bytes that the cases of one test may add to the peak of the process
RGBA = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
TABLE = np.random.default_rng(1).uniform(0.1, 0.9, (WIDTH * HEIGHT, 9)).astype(np.float32)

# What was done, by the interpreter's own account.

_EVENTS: list[tuple[str, Any]] | None = None


def _note(event: str, args: tuple) -> None:
    if _EVENTS is not None and event in ("open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        _EVENTS.append((event, args[0]))
    elif _EVENTS is not None and event in ("pickle.find_class", "socket.connect", "exec", "os.remove"):
        _EVENTS.append((event, None))


sys.addaudithook(_note)


@contextmanager
def only_inside(folder: Path) -> Iterator[None]:
    """Nothing is run, and of the files near `folder`, or that passwords are in, only its own are opened."""
    global _EVENTS
    _EVENTS = []
    try:
        yield
        events = _EVENTS
    finally:
        _EVENTS = None
    near = folder.parent.resolve()
    for event, name in events:
        if event == "exec":  # an import of a module of PIL's
            continue
        assert event == "open", event
        path = Path(os.path.realpath(os.fsdecode(name))) if isinstance(name, str | bytes | Path) else near / folder.name
        assert path != Path("/etc/passwd")
        assert path.is_relative_to(folder.resolve()) or not path.is_relative_to(near), path


@pytest.fixture(autouse=True)
def no_blow_up() -> Iterator[None]:
    """Memory that is asked for and never touched is none."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# The transforms file.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def plain_scene() -> dict[str, Any]:
    frames: list[dict[str, Any]] = [
        {"file_path": f"./train/r_{i}", "transform_matrix": np.eye(4).tolist()} for i in range(3)
    ]
    return {"camera_angle_x": 0.7, "cx": 4.0, "w": WIDTH, "h": HEIGHT, "k1": 0.0, "frames": frames}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder of three views, and a picture beside it that is none of its business."""
    folder = tmp_path / "scene"
    (folder / "train").mkdir(parents=True)
    png = encoded(Image.fromarray(RGBA), "PNG")
    for i in range(3):
        (folder / "train" / f"r_{i}.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    (folder / "transforms_train.json").write_text(json.dumps(plain_scene()))
    return folder


def load(path: Path) -> Any:
    return data.load_training(SceneConfig(name=str(path))).images


def refusal(folder: Path) -> str:
    """The message with which a scene is refused, within the rules for all of them."""
    with only_inside(folder), pytest.raises(InputError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def check_views(images: PosedImages | None) -> None:
    if images is not None:
        assert images.rgba.dtype == np.uint8
        cameras = images.cameras
        assert len(images.rgba) == np.prod(cameras.size, axis=1).sum()
        assert len(images.offset) == len(cameras.c2w)
        assert np.isfinite(cameras.c2w).all()
        assert np.isfinite(cameras.centre_xy).all()
        assert (np.asarray(cameras.focal_xy) > 0).all()
        assert np.isfinite(cameras.focal_xy).all()


json_texts = changed_json(plain_scene()).map(json.dumps).map(str.encode)


@fuzz
@given(json_texts | changed_bytes(json.dumps(plain_scene()).encode()) | json_texts.flatmap(changed_bytes))
def test_a_changed_json_is_read_or_refused(scene: Path, text: bytes) -> None:
    (scene / "transforms_train.json").write_bytes(text)
    with only_inside(scene):
        check_views(or_input_error(lambda: load(scene)))


def write_frame(folder: Path, frame: dict[str, Any], **change: Any) -> None:
    plain = plain_scene()
    plain["frames"][1] |= frame
    (folder / "transforms_train.json").write_text(json.dumps(plain | change))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/..", "no 'file_path'"),
        ("train/../.", "no 'file_path'"),
        ("a\0b", "no 'file_path'"),
        ("\ud800", "no 'file_path'"),
        ("//etc/passwd", "the image is missing"),
        ("n" * 300, "the image is missing"),
        ("n/" * 500 + "n", "the image is missing"),
        ("../" + "n" * 10**5, "no 'file_path'"),
    ],
)
def test_a_name_that_is_none_of_a_file_is_refused(scene: Path, name: str, said: str) -> None:
    write_frame(scene, {"file_path": name})
    text = refusal(scene)
    assert said in text
    assert len(text) < 3000


def test_a_link_to_itself_is_one_line(scene: Path) -> None:
    (scene / "train" / "r_1.png").unlink()
    (scene / "train" / "r_1.png").symlink_to("r_1.png")
    assert "r_1.png" in refusal(scene)


def test_what_is_no_file_is_not_opened(scene: Path) -> None:
    """Reading a pipe would wait for ever."""
    image = scene / "train" / "r_1.png"
    for make in (os.mkfifo, os.mkdir):
        image.unlink()
        make(image)
        assert f"{image}: is not a file" in refusal(scene)
        image.rmdir() if image.is_dir() else image.unlink()
        image.touch()


def test_names_that_are_no_utf8_are_read(scene: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(scene.parent) + b"/\xff\xfe"))
    scene.rename(folder)
    assert load(folder).rgba.shape == (2 * HEIGHT * WIDTH, 4)
    (folder / "train" / "r_1.png").unlink()
    assert "the image is missing" in refusal(folder)


def test_a_folder_whose_name_has_lines_is_one_line(scene: Path) -> None:
    (scene / "train" / "r_1.png").unlink()
    folder = scene.rename(scene.parent / "a\nb\u2028c")
    assert "the image is missing" in refusal(folder)


@pytest.mark.parametrize("field", ["name", "data_dir"])
def test_the_home_of_nobody_is_no_scene(field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise InputError("not found")

    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    monkeypatch.delenv("JAXNGP_DATA", raising=False)  # where lego may well be
    monkeypatch.setattr(places.download, "download_scene", missing)
    with pytest.raises(InputError):
        data.locate(SceneConfig(**({"name": "lego"} | {field: "~no-such-user/x"})))


@pytest.mark.parametrize(
    "change",
    [
        {"camera_angle_x": 5e-324},
        {"camera_angle_x": 1e-300},
        {"fl_x": 1e300},
        {"fl_y": 1e-300},
        {"cx": 1e300},
        {"w": 1e308, "h": 1e308, "fl_x": 1.0},
    ],
)
def test_a_camera_beyond_float32_is_refused(scene: Path, change: dict[str, float]) -> None:
    write_frame(scene, {}, **({"w": WIDTH, "h": HEIGHT} | change))
    assert "focal length" in refusal(scene)


def test_more_views_than_the_memory_holds_are_one_line(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(splits, "read_images", empty)
    assert "do not fit into memory" in refusal(scene)


# The images.

OPAQUE = Image.fromarray(RGBA).convert("RGB")
PALETTE = OPAQUE.convert("P")
VALID_IMAGES = {
    **{f"png {mode}": encoded(Image.fromarray(RGBA).convert(mode), "PNG") for mode in ("RGBA", "RGB", "L", "LA", "1")},
    "png palette": encoded(PALETTE, "PNG"),
    "png transparent palette": encoded(PALETTE, "PNG", transparency=b"\0\x80\xff"),
    "png transparent grey": encoded(OPAQUE.convert("L"), "PNG", transparency=3),
    "png 16 bit": encoded(Image.fromarray(np.arange(32, dtype=np.uint16).reshape(4, 8)), "PNG"),
    "png animated": encoded(OPAQUE, "PNG", save_all=True, append_images=[OPAQUE.rotate(180)]),
    "jpeg": encoded(OPAQUE, "JPEG"),
    "jpeg progressive": encoded(OPAQUE, "JPEG", progressive=True),
    "jpeg grey": encoded(OPAQUE.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(OPAQUE.convert("CMYK"), "JPEG"),
    "mpo": encoded(OPAQUE, "MPO", save_all=True, append_images=[OPAQUE]),
    **{f"tiff {c}": encoded(Image.fromarray(RGBA), "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate")},
    "tiff jpeg": encoded(OPAQUE, "TIFF", compression="jpeg"),
    "tiff cmyk": encoded(OPAQUE.convert("CMYK"), "TIFF"),
    "tiff float": encoded(OPAQUE.convert("F"), "TIFF"),
    "tiff pages": encoded(OPAQUE, "TIFF", save_all=True, append_images=[OPAQUE]),
    "webp": encoded(Image.fromarray(RGBA), "WEBP"),
    "webp lossless": encoded(Image.fromarray(RGBA), "WEBP", lossless=True),
    "webp animated": encoded(OPAQUE, "WEBP", save_all=True, append_images=[OPAQUE.rotate(180)]),
    "bmp": encoded(OPAQUE, "BMP"),
    "gif": encoded(PALETTE, "GIF"),
    "eps": encoded(OPAQUE, "EPS"),
    "ppm": encoded(OPAQUE, "PPM"),
}
REFUSED = {"png 1", "jpeg cmyk", "tiff cmyk", "tiff float", "gif", "eps", "ppm"}


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


KINDS = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IEND"]
INFLATES = b"x\0\0" + zlib.compress(b"\0" * 10**7)
EXTREME = st.sampled_from([0, 1, 255, 2**15, 2**16 - 1, 9000, 2**31 - 1, 2**31, 2**32 - 1])


@st.composite
def changed_png(draw: st.DrawFn) -> bytes:
    """A PNG whose checksums are right and whose chunks are not."""
    chunks = png_chunks(VALID_IMAGES[draw(st.sampled_from([k for k in VALID_IMAGES if k.startswith("png")]))])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(chunks) - 1))
        kind, body = chunks[at]
        change = draw(st.sampled_from(["body", "kind", "remove", "double", "new", "size", "depth"]))
        if change == "size":
            chunks[0] = chunks[0][0], struct.pack(">II", draw(EXTREME), draw(EXTREME)) + chunks[0][1][8:]
        elif change == "depth":
            chunks[0] = chunks[0][0], chunks[0][1][:8] + bytes(draw(st.lists(st.integers(0, 17), max_size=5)))
        elif change == "remove" and len(chunks) > 1:
            del chunks[at]
        else:
            new = draw(changed_bytes(body)) if change == "body" else body
            name = draw(st.sampled_from(KINDS)) if change in ("kind", "new") else kind
            new = draw(st.sampled_from([body, INFLATES, b""])) if change == "new" else new
            chunks[at : at + (change in ("body", "kind"))] = [(name, new)]
    return png_file(chunks)


def load_image(scene: Path, content: bytes) -> np.ndarray:
    """The pixels of the only view of a scene."""
    path = scene / "train" / "r_0.png"
    path.write_bytes(content)
    (scene / "transforms_train.json").write_text(json.dumps(plain_scene() | {"frames": plain_scene()["frames"][:1]}))
    images = load(scene)
    check_views(images)
    return images.image(0)


@pytest.mark.parametrize("kind", VALID_IMAGES)
def test_every_valid_image_is_read_or_refused(scene: Path, kind: str) -> None:
    with only_inside(scene):
        found = or_input_error(lambda: load_image(scene, VALID_IMAGES[kind]))
    assert (found is None) == (kind in REFUSED)
    if found is not None and ("tiff_" in kind or "None" in kind or kind in ("png RGBA", "webp lossless")):
        np.testing.assert_array_equal(found[found[..., 3] > 0], RGBA[RGBA[..., 3] > 0])


@fuzz
@given(st.sampled_from([*VALID_IMAGES.values()]).flatmap(changed_bytes) | changed_png() | st.binary(max_size=99))
def test_a_changed_image_is_read_or_refused(scene: Path, content: bytes) -> None:
    with only_inside(scene):
        or_input_error(lambda: load_image(scene, content))


@pytest.mark.parametrize("side", [2**14, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_many_pixels_is_refused_and_closed(scene: Path, side: int) -> None:
    chunks = png_chunks(VALID_IMAGES["png RGBA"])
    chunks[0] = b"IHDR", struct.pack(">II", side, 2**13) + chunks[0][1][8:]
    (scene / "train" / "r_1.png").write_bytes(png_file(chunks))
    assert "pixels" in refusal(scene)


def test_a_small_file_of_many_pixels_is_refused(scene: Path) -> None:
    """A decoder makes up what a JPEG lacks: 80 million pixels, 1 GB, from 700 bytes."""
    content = VALID_IMAGES["jpeg"]
    at = content.index(b"\xff\xc0") + 5
    promise = content[:at] + struct.pack(">HH", 9000, 9000) + content[at + 4 :]
    with only_inside(scene):
        assert or_input_error(lambda: load_image(scene, promise)) is None


def test_few_large_images_are_decoded_side_by_side(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pool = photos.ThreadPoolExecutor

    def asked_pool(workers: int) -> Any:
        asked.append(workers)
        return pool(workers)

    monkeypatch.setattr(photos, "ThreadPoolExecutor", asked_pool)
    monkeypatch.setattr(photos.os, "cpu_count", lambda: 64)
    load(scene)
    monkeypatch.setattr(photos, "PIXELS_AT_ONCE", 3 * WIDTH * HEIGHT)
    load(scene)
    monkeypatch.setattr(photos, "PIXELS_AT_ONCE", 1)
    load(scene)
    assert asked[1::2] == [8, 3, 1]  # after those that read the headers


# Ray tables.

HEADERS = {
    "descr": ["<f4", ">f4", "<f8", "<f2", "|O", "<f16", "<i4", "<U9", "V8", [("a", "<f4")], [("a\nb", "<f4", (9,))], 5],
    "fortran_order": [False, True, None, 1, "x"],
    "shape": [(32, 9), (9, 32), (288,), (32, 9, 1), (0, 9), (2**40, 9), (-1, 9), (2**62, 2**62), (32, 9.0), 32, "9"],
}


@st.composite
def npy_files(draw: st.DrawFn) -> bytes:
    """Arrays as numpy stores them, but for a field or two of the header, its length, its version or its end."""
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": TABLE.shape}
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(HEADERS)))
        header[key] = draw(st.sampled_from(HEADERS[key]) | st.sampled_from(AWKWARD))
    text = repr(header).encode("latin1", "replace")
    text = draw(st.just(text) | changed_bytes(text)) + b" " * draw(st.integers(0, 20)) + b"\n"
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 4, 255]))
    length = draw(st.just(len(text)) | st.sampled_from([0, len(text) + 9, 2**16 - 1]))
    length = min(length, 2**16 - 1)
    prefix = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length)
    payload = TABLE.tobytes()
    return prefix + text + draw(st.just(payload) | st.just(payload[:-3]) | st.just(payload * 2) | st.just(b""))


NPY = io.BytesIO()
np.save(NPY, TABLE)
NPZ = io.BytesIO()
np.savez_compressed(NPZ, rays=TABLE, size=np.array([WIDTH, HEIGHT]))
SIZES = [np.array(size) for size in ([WIDTH, HEIGHT], [0, 2], [-1, 4], [2**40, 1], [8.0, 4.0], [1, 2, 3], ["8", "4"])]


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@st.composite
def npz_files(draw: st.DrawFn) -> bytes:
    """Archives of any few entries, whose list of contents may say something else than what is there."""
    names = st.sampled_from(["rays.npy", "rays", "size.npy", "size", "a.npy", "../rays.npy", "/rays.npy", "a\nb"])
    contents = st.sampled_from(
        [NPY.getvalue(), NPZ.getvalue(), b"", b"text", pickle.dumps(TABLE), *map(as_npy, SIZES), b"\0" * 10**6]
    )
    entries = draw(st.dictionaries(names, contents | npy_files(), max_size=4)) | draw(
        st.sampled_from([{}, {"rays.npy": NPY.getvalue()}])
    )
    stream = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return draw(st.just(stream.getvalue()) | changed_bytes(stream.getvalue()))


@fuzz
@given(
    npy_files() | npz_files() | changed_bytes(NPY.getvalue()) | changed_bytes(NPZ.getvalue()),
    st.sampled_from(["train.npy", "train.npz", "train_8x4.pkl", "test_8x4.npz"]),
)
def test_a_changed_array_file_is_read_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    folder = tmp_path / "scene"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    with only_inside(folder):
        table = or_input_error(lambda: load(path))
    path.unlink()
    if table is not None:
        assert np.isfinite(table.rays.origin).all()
        np.testing.assert_allclose(np.linalg.norm(table.rays.direction, axis=1), 1, rtol=1e-5)
        assert ((table.rgb >= 0) & (table.rgb <= 1)).all()


def table_refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with only_inside(path.parent), pytest.raises(InputError) as caught:
        load(path)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def zip_of(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_an_entry_that_is_no_array_is_refused(tmp_path: Path) -> None:
    for name in ("rays", "rays.npy"):
        assert "'rays' is not an array" in table_refusal(tmp_path / "train.npz", zip_of({name: b"text"}))


def test_an_archive_of_many_small_bombs_is_refused(tmp_path: Path) -> None:
    """Each within the bounds, 36 MB together."""
    zeros = as_npy(np.zeros(12 * 10**6 - 128, np.uint8))
    text = table_refusal(tmp_path / "train.npz", zip_of({f"{i}.npy": zeros for i in range(3)}))
    assert "unpacks to 36000000 bytes: refused" in text


def test_a_size_of_many_numbers_is_not_repeated(tmp_path: Path) -> None:
    entries = {"rays.npy": as_npy(TABLE), "size.npy": as_npy(np.ones(10**6, np.int8))}
    assert "'size'" in table_refusal(tmp_path / "train.npz", zip_of(entries))
    entries = {f"{'n' * 50}{i}.npy": as_npy(np.ones(2)) for i in range(1000)}
    assert "found" in table_refusal(tmp_path / "train.npz", zip_of(entries))


def test_a_pickle_of_endless_text_is_not_printed(tmp_path: Path) -> None:
    """Tuples of each other, 2^200 of them to whoever prints them, for the name of the dtype."""
    doubled = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
    junk = b"(" + doubled + b"t"  # all of them, and the last is remembered as 200
    state = b"(" + junk + b"K\x09\x85cnumpy\ndtype\n(h\xc8tR(K\x01V<\ntb\x89C\x00tb."
    content = b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR" + state
    assert "is of dtype ((((" in table_refusal(tmp_path / "train.pkl", content)


# Configs.


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [["x" * 10**5] * 9] * 9, {"a" * 10**6: 1}, 10**4000], ids=["text", "lists", "keys", "digits"]
)
def test_a_long_value_is_shown_by_its_beginning(value: Any) -> None:
    plain = json.loads(to_json(NerfConfig()))
    plain["train"]["loss"] = value
    assert len(shown(value)) < 1000
    with pytest.raises(InputError, match=r"^train\.loss = ") as caught:
        from_json(json.dumps(plain))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": {"box_side": 1e-300}}, "scene.box_side"),
        ({"scene": {"box_side": 1e300}}, "scene.box_side"),
        ({"scene": {"box_centre": [0, 1e300, 0]}}, "scene.box_centre"),
        ({"field": {"encoding": {"num_levels": 2**31, "table_size": 1, "num_features": 1}}}, "num_levels"),
    ],
)
def test_a_number_out_of_all_proportion_is_refused(change: dict[str, Any], message: str) -> None:
    def merge(plain: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        return plain | {k: merge(plain[k], v) if isinstance(v, dict) else v for k, v in change.items()}

    with pytest.raises(InputError, match=message):
        from_json(json.dumps(merge(json.loads(to_json(NerfConfig())), change)))
