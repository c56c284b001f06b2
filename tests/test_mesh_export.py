"""Meshes of a field in closed form, a soft ball, and their files under a rotated and scaled transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from judges import decibels, picture, read_glb
from soft_ball import CENTRE, LEVEL, RADIUS, TRANSFORM, TURN, SoftBall, ball_run, cameras, cast_ball

from jaxngp.config import InputError
from jaxngp.exporting import mesh, surface
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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    folder, run = tmp_path_factory.mktemp("meshes"), ball_run(SoftBall(), cameras())
    options = MeshOptions(mesh_resolution=32, opacity=float(-np.expm1(-LEVEL * run.config.sampler.step_size)))
    for suffix in mesh.SUFFIXES:
        assert "triangles" in mesh.write(run, folder / f"ball{suffix}", options)
    return folder


@pytest.mark.parametrize("suffix", mesh.SUFFIXES)
def test_files_hold_the_ball_where_it_is_in_the_source(files: Path, suffix):
    trimesh = pytest.importorskip("trimesh", reason="the extra mesh is not installed")
    loaded = trimesh.load(files / f"ball{suffix}", process=False)
    if suffix == ".glb":  # y up there: undo it
        node = loaded.to_geometry()
        vertices, normals = np.asarray(node.vertices), np.asarray(node.vertex_normals)
        turn = np.array(TURN).T @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
        vertices, normals = vertices @ turn.T, normals @ turn.T
    else:
        vertices, normals = np.asarray(loaded.vertices), np.asarray(loaded.vertex_normals)
        node = loaded
    offset = vertices - TRANSFORM.to_world(CENTRE)
    assert np.linalg.norm(offset, axis=1) == pytest.approx(4 * RADIUS, rel=1e-3)
    outward = offset / np.linalg.norm(offset, axis=1, keepdims=True)
    assert (normals * outward).sum(axis=1).min() > 0.98
    assert node.is_watertight
    expected = 0.5 + 0.4 * outward @ np.array(TURN).T
    if suffix != ".glb":
        rgb = np.asarray(node.visual.vertex_colors)[:, :3] / 255
    else:  # linear light there
        described, arrays = read_glb(files / "ball.glb")
        rgb = arrays[described["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]][:, :3]
        rgb = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(rgb, expected, atol=0.06)


def test_a_mesh_looks_like_the_ball():
    """Beside rays that are cast at the sphere: the judge's rasteriser and the mesh agree with them."""
    found, view = extract(SoftBall()), cameras()[3]
    seen = picture(view, found.vertices, found.faces, 0.5 + 0.4 * (found.vertices - CENTRE) / RADIUS, oversample=4)
    assert decibels(seen, cast_ball(view)) > 35
