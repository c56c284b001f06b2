"""Images from files: the values that are written come back, large ones stay on disk, and what is wrong is one line."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from strategies import changed_bytes, fuzz, or_input_error

from jaxngp.config import InputError
from jaxngp.data import image
from jaxngp.data.image import StoredImage, encode_srgb, read_image, tiles

HEIGHT, WIDTH = 5, 7
RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
GREY16 = RNG.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
RGB = Image.fromarray(np.ascontiguousarray(RGBA[..., :3]))
FLOATS = Image.fromarray(np.asarray(RGB.convert("F")) / 255)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def save(folder: Path, picture: Image.Image, name: str, **options: Any) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def read(path: Path, background: image.Background = "white") -> np.ndarray:
    return read_image(path, background=background).pixels


def refusal(path: Path) -> str:
    """The one line with which an image is refused."""
    with pytest.raises(InputError) as caught:
        read_image(path, background="white")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def blended(rgba: np.ndarray, level: int) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(rgba[..., :3] * alpha + level * (1 - alpha))


def big_endian_png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, which pillow cannot write in colour."""
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of_16_bit_colour(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    content = pixels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 259: 1, 262: 2, 273: 14, 277: channels, 278: height, 279: len(content)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.insert(2, struct.pack("<HHII", 258, 3, channels, 8))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    head = b"II*\0" + struct.pack("<I", 14 + len(content)) + struct.pack("<3H", 16, 16, 16)
    return head + content + directory


# What is read.


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "lies.jpg"])
def test_colours_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    kind = {".jpg": "PNG", ".tif": "TIFF"}.get(Path(name).suffix, Path(name).suffix[1:].upper())
    path = save(tmp_path, RGB, name, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    stored = read_image(path, background="white")
    np.testing.assert_array_equal(stored.pixels, RGBA[..., :3])
    assert (stored.name, stored.height, stored.width, stored.peak) == (name, HEIGHT, WIDTH, 255)
    assert stored.num_bytes == path.stat().st_size
    assert stored.notes == ()
    assert stored.pixels.dtype == np.uint8


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_alpha_shows_the_background(tmp_path: Path, background: image.Background, level: int) -> None:
    path = save(tmp_path, Image.fromarray(RGBA), "a.png")
    np.testing.assert_array_equal(read(path, background), blended(RGBA, level))
    grey = RGBA[..., [0, 0, 0, 3]]
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(RGBA[..., [0, 3]])), "la.png")
    np.testing.assert_array_equal(read(path, background), blended(grey, level))


@pytest.mark.parametrize("level", [0, 255])
def test_blending_is_rounded(level: int) -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour] * 3 + [alpha], axis=-1).astype(np.uint8)
    exact = (rgba[..., :3] * (rgba[..., 3:] / 255)) + level * (1 - rgba[..., 3:] / 255)
    assert np.abs(image._over(rgba, level) - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, mode: str) -> None:
    picture = RGB.convert("L").convert(mode)
    expected = np.asarray(picture.convert("L"))
    for name in ("a.png", "a.tif", "a.bmp"):
        np.testing.assert_array_equal(read(save(tmp_path, picture, name)), np.stack([expected] * 3, axis=-1))


def test_palettes(tmp_path: Path) -> None:
    picture = RGB.quantize(16)
    colours = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read(save(tmp_path, picture, "a.png")), colours)
    alpha = np.arange(256, dtype=np.uint8)[::-1]
    path = save(tmp_path, picture, "t.png", transparency=alpha.tobytes())
    rgba = np.concatenate([colours, alpha[np.asarray(picture)][..., None]], axis=-1)
    np.testing.assert_array_equal(read(path, "black"), blended(rgba, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits_is_kept(tmp_path: Path, name: str) -> None:
    stored = read_image(save(tmp_path, Image.fromarray(GREY16), name), background="white")
    assert stored.pixels.dtype == np.uint16
    assert stored.notes == ()
    np.testing.assert_array_equal(stored.pixels, np.stack([GREY16] * 3, axis=-1))
    np.testing.assert_array_equal(stored.read(slice(0, 2), slice(1, 3))[..., 0], GREY16[:2, 1:3] / np.float32(65535))


def test_a_transparent_grey_of_16_bits(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(GREY16), "a.png", transparency=int(GREY16[1, 2]))
    assert (read(path)[1, 2] == 65535).all()
    assert (read(path, "black")[1, 2] == 0).all()
    assert (read(path)[2, 2] == GREY16[2, 2]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PNG of grey and alpha"])
def test_colour_of_16_bits_is_noted(tmp_path: Path, kind: str) -> None:
    colours = np.stack([GREY16, GREY16 // 3, GREY16 // 7], axis=-1)
    if kind == "TIFF":
        content = tiff_of_16_bit_colour(colours)
    elif kind == "PNG":
        content = big_endian_png(colours, 2)
    else:
        colours = colours[..., :1].repeat(3, axis=-1)
        content = big_endian_png(np.stack([GREY16, np.full_like(GREY16, 65535)], axis=-1), 4)
    (tmp_path / "a").write_bytes(content)
    stored = read_image(tmp_path / "a", background="white")
    np.testing.assert_array_equal(stored.pixels, colours >> 8)
    (note,) = stored.notes
    assert note.startswith("a has 16 bits a channel, of which the upper 8 are read")


def test_a_float_tiff_is_srgb_as_it_stands(tmp_path: Path) -> None:
    values = RNG.normal(1, 2, (HEIGHT, WIDTH)).astype(np.float32)
    stored = read_image(save(tmp_path, Image.fromarray(values), "a.tif"), background="white")
    assert stored.peak == 1
    np.testing.assert_array_equal(stored.pixels, np.stack([values] * 3, axis=-1))
    values[1, 1], values[2, 2] = np.nan, np.inf
    assert "2 values of its pixels are NaN or infinite" in refusal(save(tmp_path, Image.fromarray(values), "a.tif"))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    flat = Image.new("CMYK", (32, 16), (255, 0, 0, 0))  # cyan, which a JPEG hardly changes
    for name in ("a.jpg", "a.tif"):
        pixels = read(save(tmp_path, flat, name))
        assert np.abs(pixels.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    a = RGBA[..., :3]
    upright = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.swapaxes(0, 1)}
    upright |= {6: np.rot90(a, -1), 7: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90(a)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read(save(tmp_path, RGB, name, exif=exif)), upright[orientation])


@pytest.mark.parametrize("dtype", image.PEAKS)
def test_an_array_is_mapped(tmp_path: Path, dtype: str) -> None:
    pixels = (RNG.random((HEIGHT, WIDTH, 3)) * image.PEAKS[dtype]).astype(dtype)
    np.save(tmp_path / "a.npy", pixels)
    stored = read_image(tmp_path / "a.npy", background="white")
    assert isinstance(stored.pixels, np.memmap)
    assert not stored.pixels.flags.writeable
    np.testing.assert_array_equal(stored.pixels, pixels)
    np.testing.assert_allclose(stored.read(slice(None), slice(None)), pixels / image.PEAKS[dtype], rtol=1e-6)


def test_an_array_with_a_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "STRIP_BYTES", 12 * WIDTH * 2)  # two rows
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    pixels[0, 1], pixels[4, 2, 2] = np.nan, -np.inf
    np.save(tmp_path / "a.npy", pixels)
    assert "4 values of its pixels are NaN or infinite" in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("kind", ["npy", "tif"])
@pytest.mark.parametrize(
    ("pixels", "peak"),
    [
        (RNG.integers(0, 256, (HEIGHT, WIDTH)), 255),
        (RNG.random((HEIGHT, WIDTH)) * 255, 255),  # resampled
        (RNG.integers(0, 2, (HEIGHT, WIDTH)) * 3, 255),  # dark
        (RNG.random((HEIGHT, WIDTH)) * 65535, 65535),
    ],
    ids=["integers", "fractions", "dark", "16-bit"],
)
def test_floats_on_another_scale_are_refused(tmp_path: Path, kind: str, pixels: np.ndarray, peak: int) -> None:
    """They would be learned as light so many times too bright, and shown as white."""
    path = tmp_path / f"a.{kind}"
    values = pixels.astype(np.float32)
    np.save(path, np.stack([values] * 3, axis=-1)) if kind == "npy" else Image.fromarray(values).save(path)
    text = refusal(path)
    assert f"as on a scale of 0 to {peak}, but white is 1" in text
    assert f"divide them by {peak}" in text


@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_floats_that_are_brighter_than_white(tmp_path: Path, kind: str) -> None:
    """Some may be, as lights are; that is said. A picture of 0 and 1 is none of integers to 255."""
    values = RNG.random((HEIGHT, WIDTH)).astype(np.float32)
    for brightest, notes in ((0.9, 0), (60.0, 1)):
        values[0, 0] = brightest
        path = tmp_path / f"a{notes}.{kind}"
        np.save(path, np.stack([values] * 3, axis=-1)) if kind == "npy" else Image.fromarray(values).save(path)
        stored = read_image(path, background="white")
        assert len(stored.notes) == notes
        assert not notes or "values up to 60, where 1 is white" in stored.notes[0]
    np.save(tmp_path / "binary.npy", np.ones((HEIGHT, WIDTH, 3), np.float32))
    assert read_image(tmp_path / "binary.npy", background="white").notes == ()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float64),
        np.zeros((4, 4, 3), ">u2"),
        np.asfortranarray(np.zeros((4, 4, 3), np.uint8)),
        np.zeros((1, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(3, [("a\nb", "u1")]),
        np.array([{}] * 4, object),
    ],
    ids=lambda a: f"{a.dtype.str}-{a.shape}-{a.flags.c_contiguous}",
)
def test_an_array_of_another_kind_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", pixels, allow_pickle=True)
    text = refusal(tmp_path / "a.npy")
    assert "expected" in text or "is no readable image" in text


# EXR.


def save_exr(path: Path, channels: dict[str, np.ndarray]) -> Path:
    exr = pytest.importorskip("OpenEXR", reason="the extra image is not installed")
    with exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, channels) as file:
        file.write(str(path))
    return path


def srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.maximum(linear.astype(np.float64), 0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_exr_is_encoded_and_stays_bright(tmp_path: Path, dtype: type) -> None:
    linear: np.ndarray = RNG.uniform(-0.1, 1, (HEIGHT, WIDTH, 3)).astype(dtype)
    linear[0, 0] = 0.002, 1, 100
    stored = read_image(save_exr(tmp_path / "a.exr", {"RGB": linear}), background="white")
    assert stored.pixels.dtype == np.float32
    np.testing.assert_allclose(stored.pixels, srgb(linear), atol=1e-6, rtol=1e-5)
    assert stored.pixels[0, 0, 2] > 7


def test_the_alpha_of_an_exr_is_multiplied_already(tmp_path: Path) -> None:
    alpha = RNG.random((HEIGHT, WIDTH, 1)).astype(np.float32)
    rgb = RNG.random((HEIGHT, WIDTH, 3)).astype(np.float32) * alpha
    path = save_exr(tmp_path / "a.exr", {"RGBA": np.concatenate([rgb, alpha], axis=-1)})
    np.testing.assert_allclose(read(path, "black"), srgb(rgb), atol=1e-6)
    np.testing.assert_allclose(read(path, "white"), srgb(rgb + 1 - alpha), atol=1e-6)


def test_the_luminance_of_an_exr_is_grey(tmp_path: Path) -> None:
    grey = RNG.random((HEIGHT, WIDTH)).astype(np.float32)
    path = save_exr(tmp_path / "a.exr", {"Y": grey})
    np.testing.assert_allclose(read(path), srgb(np.stack([grey] * 3, axis=-1)), atol=1e-6)


def test_an_exr_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    plane = np.ones((HEIGHT, WIDTH), np.float32)
    assert "expected channels R, G and B or Y" in refusal(save_exr(tmp_path / "a.exr", {"Z": plane}))
    path = save_exr(tmp_path / "b.exr", {"Y": np.where(np.arange(WIDTH) == 3, np.nan, plane).astype(np.float32)})
    assert f"{HEIGHT} values of its pixels are NaN or infinite" in refusal(path)
    content = path.read_bytes()
    for end in (8, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:end])
        assert "is no readable image" in refusal(path)


def test_an_exr_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    (tmp_path / "a.exr").write_bytes(image.EXR_MAGIC + b"\2\0\0\0")
    assert "pip install '.[image]'" in refusal(tmp_path / "a.exr")


def test_srgb_is_continuous_and_finite() -> None:
    x = np.linspace(0, 0.01, 10_001, dtype=np.float32)
    assert np.diff(encode_srgb(x)).max() < 2e-5
    np.testing.assert_allclose(encode_srgb(np.array([0, 1, -1, 65504], np.float32)), [0, 1, 0, 107.1], rtol=1e-3)
    assert encode_srgb(x).dtype == np.float32


def test_albert(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("OpenEXR", reason="the extra image is not installed")
    path = Path(os.environ.get("JAXNGP_DATA", "/nowhere"), "image", "albert.exr")
    if not path.exists():
        pytest.skip("needs image/albert.exr in $JAXNGP_DATA")
    pixels = read(path)
    assert pixels.shape == (1024, 1024, 3)
    assert 0 < pixels.min() < pixels.max() < 1


# Large images.


def stored_array(path: Path, height: int, width: int, dtype: str = "uint8") -> StoredImage:
    np.save(path, (RNG.random((height, width, 3)) * image.PEAKS[dtype]).astype(dtype))
    return read_image(path, background="white")


@pytest.mark.parametrize("dtype", image.PEAKS)
@pytest.mark.parametrize("resident", [0, 2**29], ids=["copied", "indexed"])
def test_gather_and_read_are_indexing(
    tmp_path: Path, dtype: str, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "RESIDENT_BYTES", resident)
    mapped = stored_array(tmp_path / "a.npy", 40, 30, dtype)
    pixels = np.load(tmp_path / "a.npy")
    for stored in (mapped, StoredImage("a", pixels, 1)):
        y, x = RNG.integers(0, 40, 500), RNG.integers(0, 30, 500).astype(np.int32)
        found = stored.gather(y, x)
        np.testing.assert_array_equal(found, pixels[y, x])
        assert found.dtype == pixels.dtype
        assert stored.gather(y[:0], x[:0]).shape == (0, 3)
        for rows, columns in ((slice(3, 20), slice(5, 6)), (slice(None), slice(None)), (slice(38, 99), slice(9, 9))):
            part = stored.read(rows, columns)
            assert part.dtype == np.float32
            np.testing.assert_allclose(part, pixels[rows, columns] / stored.peak, rtol=1e-6)
        for wrong in ([-1], [40]):
            with pytest.raises(IndexError):
                stored.gather(np.array(wrong), np.array([0]))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_tiles_cover_every_pixel_once(height: int, width: int, size: int) -> None:
    count = np.zeros((height, width), int)
    for rows, columns in tiles(height, width, size):
        assert 0 < rows.stop - rows.start <= size
        assert 0 < columns.stop - columns.start <= size
        count[rows, columns] += 1
    assert (count == 1).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_map_stays_out_of_memory(tmp_path: Path) -> None:
    """400 MB of which every page is touched, by points and by tiles, where 32 MB may be resident."""
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (8192, 16384, 3))[::97, ::97] = 7
    program = f"""
import numpy as np
from pathlib import Path
from jaxngp.data import image

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) // 1024

image.RESIDENT_BYTES = 2**25
stored = image.read_image(Path({str(tmp_path / "a.npy")!r}), background="white")
rng, before = np.random.default_rng(0), resident()
for _ in range(4):
    y, x = rng.integers(0, 8192, 2**14), rng.integers(0, 16384, 2**14)
    assert (stored.gather(y, x)[:, 0] == 7 * ((y % 97 == 0) & (x % 97 == 0))).all()
for rows, columns in image.tiles(8192, 16384, 1024):
    stored.read(rows, columns)
print(resident() - before)
stored.pixels.max()
print(resident() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours, touched = map(int, result.stdout.split())
    assert ours < 64  # MB
    assert touched > 350  # so that the first number says something


def test_a_map_that_shrinks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "RESIDENT_BYTES", 0)
    stored, again = stored_array(tmp_path / "a.npy", 40, 30), read_image(tmp_path / "a.npy", background="white")
    stored.gather(np.array([0]), np.array([0]))
    os.truncate(tmp_path / "a.npy", 200)
    for call in (lambda: stored.gather(np.array([39]), np.array([0])), lambda: stored.read(slice(39, 40), slice(0, 9))):
        with pytest.raises(InputError, match="became shorter while it was read"):
            call()
    (tmp_path / "a.npy").unlink()
    with pytest.raises(InputError, match="cannot be read again"):
        again.gather(np.array([0]), np.array([0]))


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F"])
def test_a_large_image_is_decoded_once(tmp_path: Path, cache: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = {"RGBA": Image.fromarray(RGBA), "I;16": Image.fromarray(GREY16), "F": FLOATS}[mode]
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, picture, "a b.tif", exif=exif)
    expected = read(path)
    monkeypatch.setattr(image, "DECODED_BYTES", 10)
    monkeypatch.setattr(image, "STRIP_BYTES", 12 * HEIGHT * 2)  # two rows
    first = read_image(path, background="white")
    (kept,) = cache.iterdir()
    assert kept.name.startswith("a_b-")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", None)
        patch.setattr(image, "_decode", None)
        second = read_image(path, background="white")
    for stored in (first, second):
        assert isinstance(stored.pixels, np.memmap)
        np.testing.assert_array_equal(stored.pixels, expected)
        assert stored.num_bytes == path.stat().st_size
    read_image(path, background="black")
    os.utime(path, (1, 1))
    read_image(path, background="white")
    assert len([*cache.iterdir()]) == 3


def test_a_broken_large_image_leaves_no_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image, "DECODED_BYTES", 10)
    path = save(tmp_path, RGB, "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(image, "_to_pixels", fail)
        assert "No space left on device" in refusal(path)
    assert not [*cache.iterdir()]
    path.write_bytes(path.read_bytes()[:-40])
    assert "broken or truncated" in refusal(path)
    assert not [*cache.iterdir()]


def test_more_pixels_than_memory_holds_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert "more than the memory holds" in refusal(save(tmp_path, RGB, "a.png"))


def test_pillows_own_limit_is_lifted_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    np.testing.assert_array_equal(read(save(tmp_path, RGB, "a.png")), RGBA[..., :3])
    assert Image.MAX_IMAGE_PIXELS == 3
    (tmp_path / "a.png").write_bytes(b"")
    refusal(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == 3


# What is wrong.


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.png", b"", "is no readable image"),
        ("a.png", b"no image", "is no readable image"),
        ("a.npy", np.lib.format.MAGIC_PREFIX, "is no readable image"),
        ("a.png", encoded(RGB, "PNG")[:-40], "broken or truncated"),
        ("a.jpg", encoded(RGB, "JPEG")[:-40], "broken or truncated"),
        ("a.tif", encoded(RGB, "TIFF")[:20], "is no readable image"),
        ("a.png", encoded(RGB, "EPS"), "is no readable image"),
        ("a.png", encoded(RGB, "PPM"), "is no readable image"),
        ("a.tif", encoded(Image.new("I", (4, 4)), "TIFF"), "pixel format 'I' is not supported"),
        ("a.tif", encoded(Image.new("LAB", (4, 4)), "TIFF"), "pixel format 'LAB' is not supported"),
        ("a.png", encoded(Image.new("L", (1, 4)), "PNG"), "expected 2 to 131072 a side"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name)
    assert said in text
    assert str(tmp_path / name) in text


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path / "pipe")  # opening it would wait for ever
    assert "is no file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none.png")
    assert "too long" in refusal(tmp_path / ("n" * 300))
    refusal(tmp_path / "a\0b")


@pytest.mark.parametrize("side", [20_000, 2**17, 2**17 + 1, 2**31 - 1])
def test_a_small_file_of_many_pixels_is_refused(tmp_path: Path, side: int) -> None:
    content = encoded(RGB, "PNG")
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    (tmp_path / "a.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    text = refusal(tmp_path / "a.png")
    assert "too many" in text or "a side" in text


VALID = {
    "png": encoded(Image.fromarray(RGBA), "PNG"),
    "png palette": encoded(RGB.quantize(8), "PNG", transparency=b"\0\x80\xff"),
    "png 16 bit": encoded(Image.fromarray(GREY16), "PNG", transparency=7),
    "png colour of 16 bits": big_endian_png(np.stack([GREY16] * 3, axis=-1), 2),
    "tiff": encoded(Image.fromarray(RGBA), "TIFF"),
    "tiff deflate": encoded(RGB, "TIFF", compression="tiff_deflate"),
    "tiff float": encoded(FLOATS, "TIFF"),
    "tiff colour of 16 bits": tiff_of_16_bit_colour(np.stack([GREY16] * 3, axis=-1)),
    "jpeg": encoded(RGB, "JPEG"),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "webp": encoded(Image.fromarray(RGBA), "WEBP"),
    "bmp": encoded(RGB, "BMP"),
}


def npy(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


FILES = [*VALID.values(), npy(RGBA[..., :3]), npy(RGBA[..., :3].astype(np.float32))]


def check_sound(stored: StoredImage | None) -> None:
    if stored is not None:
        assert stored.pixels.shape == (stored.height, stored.width, 3)
        assert min(stored.height, stored.width) >= image.MIN_SIDE
        assert stored.pixels.dtype.name in image.PEAKS
        values = stored.read(slice(0, 9), slice(0, 9))
        assert np.isfinite(values).all()
        assert all("\n" not in note for note in stored.notes)


@fuzz
@given(st.sampled_from(FILES).flatmap(changed_bytes) | st.sampled_from(FILES) | st.binary(max_size=99))
def test_a_changed_image_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_sound(or_input_error(lambda: read_image(path, background="black")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # kB
    path.unlink()


@fuzz
@given(st.data())
def test_a_changed_exr_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = save_exr(tmp_path / "a.exr", {"RGBA": RGBA / np.float32(255)})
    path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    check_sound(or_input_error(lambda: read_image(path, background="black")))
