"""Meshes of a field in closed form, a soft ball, and their files under a rotated and scaled transform."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from judges import decibels, picture, rasterise, read_glb, textured_picture
from PIL import Image
from soft_ball import CENTRE, LEVEL, RADIUS, TRANSFORM, TURN, SoftBall, ball_run, cameras, cast_ball

from jaxngp.config import InputError
from jaxngp.exporting import atlas, mesh, surface, texture
from jaxngp.exporting.mesh import MeshOptions

UNIT = np.array([[0.0, 0, 0], [1, 1, 1]])


def extract(field, views=None, resolution=48, **options):
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    run = ball_run(field)
    return surface.extract(field, run.occupancy, views, box=UNIT, resolution=resolution, level=LEVEL, **options)


def radii(found):
    return np.linalg.norm(found.vertices - CENTRE, axis=1)


def is_closed(faces):
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward = {tuple(edge) for edge in edges.tolist()}
    return len(forward) == len(edges) and all((b, a) in forward for a, b in forward)


def test_vertices_lie_where_the_density_has_the_level():
    """Its logarithm is linear in the radius, so that only the curvature of the sphere is left: h^2 / (8 R)."""
    found = extract(SoftBall())
    assert np.abs(radii(found) - RADIUS).max() < 3 * found.spacing**2 / (8 * RADIUS)
    assert is_closed(found.faces)


def test_normals_look_out():
    found = extract(SoftBall())
    outward = (found.vertices - CENTRE) / radii(found)[:, None]
    assert (found.normals * outward).sum(axis=1).min() > 0.99
    volume = (found.vertices[found.faces[:, 0]] * found.areas).sum() / 6
    assert volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)


def test_hollows_that_no_view_sees_are_filled():
    field = SoftBall(hollow=0.2)
    assert radii(extract(field)).min() < 0.21
    filled = extract(field, cameras(), hidden=True)
    assert radii(filled).min() > RADIUS - filled.spacing
    assert is_closed(filled.faces)


def test_what_no_view_sees_is_left_out():
    one_side = cameras()[:1]
    found = extract(SoftBall(), one_side)
    towards = np.asarray(one_side.c2w)[0, :, 3] - CENTRE
    along = (found.vertices - CENTRE) @ (towards / np.linalg.norm(towards))
    horizon = RADIUS**2 / np.linalg.norm(towards)
    margin = (surface.RINGS + 2 * surface.BEHIND) * found.spacing
    assert horizon - margin < along.min() < horizon + margin
    assert along.max() > RADIUS - found.spacing


def test_small_parts_are_left_out():
    """Two cubes of a lattice, of sides 10 and 2: areas 100 to 4."""
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    found = surface._march_cubes(
        np.pad(np.kron([1.0], np.ones((9, 9, 9))), ((2, 9), (2, 2), (2, 2)))
        + np.pad(np.ones((2, 2, 2)), ((16, 2), (2, 9), (2, 9))),
        0.5,
        surface.Lattice(np.zeros(3), 1.0, np.zeros(0)),
    )
    assert found.vertices[:, 0].max() > 16
    for smallest, largest in ((0.01, 18), (0.1, 11)):
        left = found.keep(surface._large(found, smallest))
        assert largest - 2 < left.vertices[:, 0].max() < largest
        assert is_closed(left.faces)


def test_no_surface_is_refused():
    with pytest.raises(InputError, match="there is no surface"):
        surface.extract(SoftBall(), None, None, box=UNIT, resolution=16, level=1e6)


OPACITY = float(-np.expm1(-LEVEL * ball_run(SoftBall()).config.sampler.step_size))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    folder, run = tmp_path_factory.mktemp("meshes"), ball_run(SoftBall(), cameras())
    options = MeshOptions(mesh_resolution=32, opacity=OPACITY)
    for suffix in mesh.SUFFIXES:
        assert "triangles" in mesh.write(run, folder / f"ball{suffix}", dataclasses.replace(options, texture=0))
        said = mesh.write(run, folder / f"textured{suffix}", dataclasses.replace(options, texture=TEXTURE))
        assert ("texture of 160" in said) == (suffix != ".ply")
    return folder


TEXTURE = 160


@pytest.mark.parametrize("name", ["ball.glb", "ball.ply", "ball.obj", "textured.glb", "textured.obj"])
def test_files_hold_the_ball_where_it_is_in_the_source(files: Path, name):
    trimesh = pytest.importorskip("trimesh", reason="the extra mesh is not installed")
    loaded = trimesh.load(files / name, process=False)
    node = loaded
    if name.endswith(".glb"):  # y up there: undo it
        node = loaded.to_geometry()
        vertices, normals = np.asarray(node.vertices), np.asarray(node.vertex_normals)
        turn = np.array(TURN).T @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
        vertices, normals = vertices @ turn.T, normals @ turn.T
    else:
        vertices, normals = np.asarray(loaded.vertices), np.asarray(loaded.vertex_normals)
    offset = vertices - TRANSFORM.to_world(CENTRE)
    assert np.linalg.norm(offset, axis=1) == pytest.approx(4 * RADIUS, rel=1e-3)
    outward = offset / np.linalg.norm(offset, axis=1, keepdims=True)
    assert (normals * outward).sum(axis=1).min() > 0.98
    expected = 0.5 + 0.4 * outward @ np.array(TURN).T
    if name.startswith("textured"):
        image, uv = node.visual.material, node.visual.uv
        image = np.asarray(getattr(image, "image", None) or image.baseColorTexture) / 255
        x, y = (uv * [1, -1] + [0, 1]).T * TEXTURE  # trimesh's origin is the lower left corner
        rgb = image[y.astype(int), x.astype(int), :3]
    elif name.endswith(".glb"):  # linear light there
        described, arrays = read_glb(files / name)
        rgb = arrays[described["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]][:, :3]
        rgb = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    else:
        rgb = np.asarray(node.visual.vertex_colors)[:, :3] / 255
    np.testing.assert_allclose(rgb, expected, atol=0.06)
    node.merge_vertices(merge_tex=True, merge_norm=True)  # those at the seams of a texture
    assert node.is_watertight


def test_a_texture_is_embedded_and_not_mipmapped(files: Path):
    described, _ = read_glb(files / "textured.glb")
    assert described["samplers"] == [{"magFilter": 9729, "minFilter": 9729, "wrapS": 33071, "wrapT": 33071}]
    view = described["bufferViews"][described["images"][0]["bufferView"]]
    content = (files / "textured.glb").read_bytes()
    start = 28 + int.from_bytes(content[12:16], "little") + view["byteOffset"]
    png = content[start : start + view["byteLength"]]
    assert Image.open(io.BytesIO(png)).size == (TEXTURE, TEXTURE)
    assert (files / "textured.png").read_bytes() == png
    assert "map_Kd textured.png" in (files / "textured.mtl").read_text()


def test_equal_runs_give_equal_bytes(files: Path, tmp_path):
    options = MeshOptions(mesh_resolution=32, opacity=OPACITY, texture=TEXTURE)
    mesh.write(ball_run(SoftBall(), cameras()), tmp_path / "again.glb", options)
    assert (tmp_path / "again.glb").read_bytes() == (files / "textured.glb").read_bytes()


def test_texels_show_the_surface_once():
    """Each texel of the atlas lies on the sphere; every face's middle is in a texel that shows it; areas agree."""
    found = extract(SoftBall(), resolution=32)
    laid = atlas.make_atlas(found, 160)
    number, position = laid.texels(found.vertices)
    assert (np.diff(number) > 0).all()
    assert np.abs(np.linalg.norm(position - CENTRE, axis=1) - RADIUS).max() < 0.5 * found.spacing
    assert not atlas._folded(laid, found).any()
    assert len(number) > 0.25 * 160**2
    assert laid.place.min() >= atlas.PAD
    assert laid.place.max() <= 160 - atlas.PAD
    corners = laid.place[laid.faces]
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    shown = 0.5 * np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()
    assert len(number) == pytest.approx(shown, rel=0.05)


def test_a_texture_too_small_for_its_charts_is_refused():
    with pytest.raises(InputError, match="--texture=16: is too small"):
        atlas.make_atlas(extract(SoftBall(), resolution=32), 16)


def test_triangles_are_rasterised_as_the_judge_does():
    found, view = extract(SoftBall()), cameras()[3]
    xy, depth = surface.project(view, found.vertices)
    number, face, weight = atlas.rasterise(np.asarray(xy, float), np.asarray(depth, float), found.faces, 64, 64)
    expected, shares = rasterise(view, found.vertices, found.faces)
    assert (np.flatnonzero(expected.ravel() >= 0) == number).mean() > 0.99
    same = expected.ravel()[number] == face
    assert same.mean() > 0.98  # single precision at edges
    np.testing.assert_allclose(weight[same], shares.reshape(-1, 3)[number][same], atol=2e-3)


def test_the_fit_is_that_of_least_squares():
    scipy = pytest.importorskip("scipy.sparse", reason="the extra mesh is not installed")
    rng = np.random.default_rng(0)
    rows, wanted = rng.normal(size=(40, 6)), rng.normal(size=(40, 3))
    found = texture._least_squares(scipy.csr_array(rows), wanted)
    expected = np.linalg.solve(rows.T @ rows + texture.PRIOR * np.eye(6), rows.T @ wanted)
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_a_textured_mesh_looks_like_the_ball():
    run = ball_run(SoftBall(), cameras())
    found, view = extract(SoftBall()), cameras()[3]
    laid = atlas.make_atlas(found, 256)
    image, place = texture.bake(run, found, laid), laid.place / laid.size
    seen = textured_picture(view, found.vertices[laid.vertex], laid.faces, place, image, oversample=4)
    assert decibels(seen, cast_ball(view)) > 35


def test_a_mesh_looks_like_the_ball():
    """Beside rays that are cast at the sphere: the judge's rasteriser and the mesh agree with them."""
    found, view = extract(SoftBall()), cameras()[3]
    seen = picture(view, found.vertices, found.faces, 0.5 + 0.4 * (found.vertices - CENTRE) / RADIUS, oversample=4)
    assert decibels(seen, cast_ball(view)) > 35
