"""Downloads, from a server of the test's own: a scene is whole and checked, or it is not there."""

import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxngp import data
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import download
from jaxngp.data.download import Source, download_scene

FOLDER = "nerf_synthetic/lego"


def scene_files() -> dict[str, bytes]:
    """A scene of two views, by path below its folder."""
    image = io.BytesIO()
    Image.fromarray(np.full((8, 8, 4), 200, np.uint8)).save(image, "png")
    frames = [{"file_path": f"./train/r_{i}", "transform_matrix": np.eye(4).tolist()} for i in range(2)]
    transforms = json.dumps({"camera_angle_x": 0.7, "frames": frames}).encode()
    return {"transforms_train.json": transforms} | {f"train/r_{i}.png": image.getvalue() for i in range(2)}


def archive_of(files: dict[str, bytes], **others: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ({f"{FOLDER}/{name}": content for name, content in files.items()} | others).items():
            archive.writestr(name, content)
    return stream.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at every path but /none, at most `limit` bytes of it a request, and ranges if `ranges`."""

    body = b""
    limit: int | None = None
    ranges = True
    sends_length = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []

    def url(self, path: str = "/scene.zip") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        if self.path == "/none":
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start and start >= len(self.server.body):
            return self.send_error(416)
        rest = self.server.body[start:]
        self.send_response(206 if start else 200)
        if self.server.sends_length:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.limit])
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def sources(*urls: str) -> dict[str, Source]:
    checksum = hashlib.sha256(scene_files()["transforms_train.json"]).hexdigest()
    return {"lego": Source(urls=urls, folder=FOLDER, checksums=(("transforms_train.json", checksum),))}


def refusal(root: Path, *urls: str) -> str:
    """The one line with which a download fails; no folder has the scene's name then, and nothing is left over."""
    looked = (root / "here", root / "there")
    with pytest.raises(InputError) as caught:
        download_scene("lego", root, looked=looked, sources=sources(*urls))
    text = str(caught.value)
    assert "\n" not in text
    for part in (*map(str, looked), "transforms_train.json", "--data_dir", "JAXNGP_DATA", "--scene=bricks"):
        assert part in text
    assert not list(root.glob("nerf_synthetic/*"))
    return text


def test_a_scene_arrives_whole(server: Server, tmp_path: Path) -> None:
    server.body = archive_of(scene_files(), **{"nerf_llff_data/fern/x.txt": b"not wanted", f"{FOLDER}/train/": b""})
    folder = download_scene("lego", tmp_path, sources=sources(server.url()))
    assert folder == tmp_path / FOLDER
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == scene_files()
    assert [p.name for p in tmp_path.iterdir()] == ["nerf_synthetic"]
    assert [p.name for p in folder.parent.iterdir()] == ["lego"]


def test_a_missing_scene_is_downloaded_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXNGP_DATA", raising=False)
    monkeypatch.setattr(download.download_scene, "__kwdefaults__", {"looked": (), "sources": sources(server.url())})
    server.body = archive_of(scene_files())
    for _ in range(2):
        assert data.locate(SceneConfig(name="lego")) == data.Location(
            tmp_path / "cache" / FOLDER, data.FORMATS[0], ("train",)
        )
    assert len(server.asked) == 1


def test_the_next_address_is_tried(server: Server, tmp_path: Path) -> None:
    server.body = archive_of(scene_files())
    download_scene("lego", tmp_path, sources=sources(server.url("/none"), server.url("/a.zip")))
    assert server.asked == [("/none", None), ("/a.zip", None)]


def test_a_truncated_transfer_is_said_and_resumed(server: Server, tmp_path: Path) -> None:
    server.body, server.limit = archive_of(scene_files()), 100
    assert f"ended at byte 100 of {len(server.body)}; run again to resume it" in refusal(tmp_path, server.url())
    server.limit = None
    download_scene("lego", tmp_path, sources=sources(server.url()))
    assert server.asked == [("/scene.zip", None), ("/scene.zip", "bytes=100-")]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.body, server.ranges = archive_of(scene_files()), False
    (tmp_path / "lego.zip.part").write_bytes(b"x" * 100)
    download_scene("lego", tmp_path, sources=sources(server.url()))


def test_a_part_that_is_whole_is_unpacked(server: Server, tmp_path: Path) -> None:
    server.body = archive_of(scene_files())
    (tmp_path / "lego.zip.part").write_bytes(server.body)
    download_scene("lego", tmp_path, sources=sources(server.url()))


def test_a_part_of_something_else_is_thrown_away(server: Server, tmp_path: Path) -> None:
    server.body = archive_of(scene_files())
    (tmp_path / "lego.zip.part").write_bytes(b"x" * 100)
    assert "broken" in refusal(tmp_path, server.url())
    download_scene("lego", tmp_path, sources=sources(server.url()))


def test_a_transfer_of_unknown_length_is_checked(server: Server, tmp_path: Path) -> None:
    server.body, server.sends_length, server.limit = archive_of(scene_files()), False, 300
    assert "broken" in refusal(tmp_path, server.url())
    server.limit = None
    download_scene("lego", tmp_path, sources=sources(server.url()))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>moved</html>", "broken"),
        (b"", "broken"),
        (archive_of({}, readme=b"none"), "has 0 files in nerf_synthetic/lego"),
        (archive_of(scene_files() | {"transforms_train.json": b"{}"}), "should have the SHA-256"),
        (archive_of({"train/r_0.png": b""}), "found no file"),
        (archive_of({k: v for k, v in scene_files().items() if "r_1" not in k}), "train/r_1.png: the image is missing"),
        (archive_of(scene_files() | {"transforms_val.json": b"{"}), "is not JSON"),
        (archive_of(scene_files() | {"../../../evil": b"x"}), "leaves the folder"),
        (archive_of(scene_files() | {"a\\..\\..\\evil": b"x"}), "leaves the folder"),
        (archive_of(scene_files() | {"train": b"a file"}), "broken"),
    ],
)
def test_what_is_not_the_scene_is_refused(server: Server, tmp_path: Path, body: bytes, said: str) -> None:
    server.body = body
    root = tmp_path / "a" / "b" / "c" / "d"
    text = refusal(root, server.url())
    assert said in text
    assert server.url() in text
    assert not list(tmp_path.rglob("evil"))
    assert not (root / "lego.zip.part").exists()


def test_a_wrong_crc_is_refused(server: Server, tmp_path: Path) -> None:
    body = bytearray(archive_of(scene_files()))
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        info = archive.getinfo(f"{FOLDER}/train/r_1.png")
    body[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    server.body = bytes(body)
    assert "broken" in refusal(tmp_path, server.url())


def test_a_folder_in_the_way_is_said_and_left_alone(server: Server, tmp_path: Path) -> None:
    server.body = archive_of(scene_files())
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "mine").write_text("kept")
    with pytest.raises(InputError, match="is in the way"):
        download_scene("lego", tmp_path, sources=sources(server.url()))
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["mine"]


def test_offline_is_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "refused" in refusal(tmp_path, "http://127.0.0.1:9/scene.zip")


def test_an_unwritable_root_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"downloading it to {tmp_path / 'file' / 'sub'} failed"):
        download_scene("lego", tmp_path / "file" / "sub", sources=sources("http://127.0.0.1:9/"))


def test_a_scene_without_an_address_is_one_paragraph(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no public address .* --scene=bricks needs no data") as caught:
        download_scene("drums", tmp_path / "new", looked=(tmp_path / "here",))
    assert str(tmp_path / "here") in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_the_address_of_lego_is_the_official_one() -> None:
    source = download.SOURCES["lego"]
    assert [url.partition("://")[0] for url in source.urls] == ["https", "http"]
    assert {url.partition("://")[2] for url in source.urls} == {
        "cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/nerf_example_data.zip"
    }
    assert [name for name, _ in source.checksums] == ["transforms_train.json", "transforms_val.json"]
