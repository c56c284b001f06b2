"""Checks of the cameras of a capture and of the box that the scene is to lie in.

Each returns a finding, or None where there is nothing to say or too little to say it of.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from jaxngp.cameras import Cameras, Rays, focus, project
from jaxngp.data.checks.agreement import GOOD, Agreement
from jaxngp.data.checks.evidence import Evidence, view_directions
from jaxngp.data.checks.finding import Finding, counted
from jaxngp.marching import box_interval

FAR = 10.0  # box sides; the cameras of NeRF-synthetic stand 1.3 away
_CELLS = 6  # per side of the box's innermost cube, whose centres are projected
_PIXELS = 24  # per side of an image, whose rays are intersected with the box


def misread_cameras(agreement: Agreement | None) -> Finding | None:
    """Another reading of the cameras by which the pictures agree far better."""
    if agreement is None or agreement.better is None:
        return None
    reading, before, after = agreement.better, agreement.meeting.fits.mean(), agreement.better_meeting.fits.mean()
    return Finding(
        reading.code,
        f"{reading.what}; {before:.0%} of {len(agreement.matches.pair)} matches between pictures fit the cameras as "
        f"they are read, and {after:.0%} if that is undone",
        reading.remedy,
    )


OUT_OF_PLACE = 0.1  # of what fits in the other views


def pose_outliers(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Views whose matches with others do not fit, where those of the others do."""
    if agreement is None or agreement.better is not None:
        return None
    matches, fits = agreement.matches, agreement.meeting.fits
    pairs = np.unique(np.stack([*matches.views, matches.pair]), axis=1)
    wrong = []
    for view in np.unique(matches.views).tolist():
        mine = (matches.views == view).any(axis=0)
        num_pairs = int((pairs[:2] == view).any(axis=0).sum())
        if num_pairs >= 3 and mine.sum() >= 60 and fits[mine].mean() < OUT_OF_PLACE * fits[~mine].mean():
            wrong.append(view)
    if not wrong or fits.mean() < 0.3 or len(wrong) > 0.25 * len(np.unique(matches.views)):
        return None
    return Finding(
        "pose_outlier",
        f"{counted(len(wrong), 'view')} {'do' if len(wrong) > 1 else 'does'} not fit the others: "
        f"{evidence.named(wrong)}; other pictures show the same things, but not where these poses put them",
        "find the poses anew, or leave these views out",
        tuple(wrong),
    )


MIN_BLUR = 1.0  # px by which rounding must move what a view sees


def rounded_poses(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Poses that were written with so few digits that pixels miss by some of their width.

    Said of rotations where they are off from orthogonal by as much as their digits explain, and of positions where
    matches miss by about as much.
    """
    cameras = evidence.cameras
    focal = float(np.median(np.asarray(cameras.focal_xy)))
    axes, position = evidence.poses[..., :3], evidence.poses[..., 3]
    distance = float(np.median(np.linalg.norm(position - focus(evidence.poses), axis=1))) or 1.0
    skew = np.abs(np.swapaxes(axes, -1, -2) @ axes - np.eye(3)).max()
    digits_axes, digits_position = _digits(axes), _digits(position)
    lost_axes = focal * 0.29 * 10.0**-digits_axes if skew > 0.1 * 10.0**-digits_axes else 0.0
    lost_position = focal * 0.29 * 10.0**-digits_position / distance
    if lost_axes < MIN_BLUR and agreement is not None and len(position) >= 8:
        meeting = agreement.better_meeting
        missed = (
            float(np.median(meeting.miss[meeting.fits])) * np.asarray(cameras.size).max() if meeting.fits.any() else 0.0
        )
        lost_position = lost_position if missed > 0.3 * lost_position else 0.0
    elif lost_axes < MIN_BLUR:
        lost_position = 0.0
    lost = max(lost_axes, lost_position)
    if lost < MIN_BLUR:
        return None
    what = (
        f"rotations have {counted(digits_axes, 'decimal')}"
        if lost_axes >= lost_position
        else f"positions have {counted(digits_position, 'decimal')}"
    )
    return Finding(
        "rounded_poses",
        f"the poses are rounded: their {what}, by which rays are off by {lost:.1f} pixels",
        "export them again with at least 7 digits",
    )


def _digits(values: np.ndarray) -> int:
    """Decimals with which all of some numbers are written, at most 9."""
    return next((k for k in range(9) if np.abs(values * 10**k - np.rint(values * 10**k)).max() < 1e-6 * 10**k), 9)


FLAT = 0.02  # how far apart cameras stand, in their distances from what they see


def no_parallax(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Cameras that stand all but at one place, so that nothing tells how far things are."""
    if agreement is None or agreement.better is not None or agreement.fitting < GOOD:
        return None
    position = evidence.poses[evidence.training][:, :, 3]
    apart = 2 * float(np.quantile(np.linalg.norm(position - np.median(position, axis=0), axis=1), 0.95))
    distance = agreement.meeting.distance[:, agreement.meeting.fits]
    ratio = apart / max(float(np.median(np.abs(distance))), 1e-12) if apart else 0.0
    if ratio > FLAT:
        return None
    return Finding(
        "no_parallax",
        f"the cameras stand all but at one place: they are {ratio:.1%} as far apart as what they see is away",
        "take pictures from different places; turning on the spot shows no depth",
    )


# The box.


UNSEEN = 0.02  # of the pixels, at most, that look at the innermost cube


def unseen_box(evidence: Evidence) -> Finding | None:
    """A box that hardly any camera sees; where it was given, its innermost cube, where detail is finest."""
    placement = evidence.placement
    inner = 0.5**placement.num_cascades if placement.given else 0.5
    share = _looking_at(evidence, 0.5 - inner, 0.5 + inner)
    if share is None or share > UNSEEN:
        return None
    return Finding(
        "unseen_box",
        f"hardly any camera sees the box that the scene is to lie in ({placement.reason}): {share:.1%} of "
        "the pixels look at " + ("it" if inner == 0.5 else "the innermost of its cubes"),
        "move it with --aabb, or remove aabb, scale or offset from the source; or the poses are wrong",
    )


def missed_box(evidence: Evidence) -> Finding | None:
    """Pixels that show something, but whose ray misses the box."""
    share = _looking_at(evidence, 0.0, 1.0)
    if share is None or 1 - share < (0.01 if evidence.has_alpha else 0.5):
        return None
    what = "of the pixels that are not transparent" if evidence.has_alpha else "of the pixels"
    return Finding(
        "missed_box",
        f"{1 - share:.0%} {what} lie on rays that miss the scene's box, and nothing can be learned there",
        "raise scene.box_side, or move scene.box_centre, by --override, in the units of the poses",
    )


def _looking_at(evidence: Evidence, low: float, high: float) -> float | None:
    """The share of the pixels that show something and take part whose rays meet a cube; None without such pixels."""
    views = [view for view in evidence.training.tolist() if view in evidence.pictures]
    if not views:
        return None
    at = (np.arange(_PIXELS) + 0.5) / _PIXELS
    share = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    rows = np.repeat(views, len(share))
    own = view_directions(evidence.cameras, rows, np.tile(share, (len(views), 1)))
    poses = np.asarray(evidence.cameras.c2w, np.float64)[rows]
    rays = Rays(poses[:, :, 3], np.einsum("mij,mj->mi", poses[:, :, :3], own))
    t_near, t_far = box_interval(rays, low, high)
    meets = np.asarray(t_far > t_near).reshape(len(views), -1)
    pictures = [evidence.pictures[view] for view in views]
    shows = np.array([_at(p.rgba[..., 3], share) > 0 for p in pictures])
    shows &= np.array([np.ones(len(share), bool) if p.keep is None else _at(p.keep, share) for p in pictures])
    weights = shows * np.asarray(evidence.cameras.size)[views].prod(axis=1, keepdims=True).astype(float)
    return float(np.sum(meets * weights) / weights.sum()) if weights.any() else None


def seen_cells(evidence: Evidence) -> np.ndarray:
    """The share of the training views (_CELLS^3,) that have each cell of the innermost cube in their image."""
    inner = 0.5 ** (evidence.placement.num_cascades - 1)
    at = 0.5 + inner * ((np.arange(_CELLS) + 0.5) / _CELLS - 0.5)
    cell = np.stack(np.meshgrid(at, at, at), axis=-1).reshape(1, -1, 3).astype(np.float32)
    views = evidence.training[:: max(1, len(evidence.training) // 100)]
    if not len(views):
        return np.ones(_CELLS**3)
    cameras: Cameras = jax.tree.map(lambda array: np.asarray(array)[views][:, None], evidence.cameras)
    xy, depth = (np.asarray(a) for a in _project(cameras, cell))
    inside = (depth > 0) & (xy >= 0).all(axis=-1) & (xy <= np.asarray(cameras.size)).all(axis=-1)
    return inside.mean(axis=0)


@jax.jit
def _project(cameras: Cameras, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    return project(cameras, position)


def _at(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The pixels of an image (H, W) at shares (N, 2) of its width and height."""
    x, y = (share * (image.shape[1], image.shape[0])).astype(int).T
    return image[y, x]


def far_cameras(evidence: Evidence) -> Finding | None:
    """Cameras very far away from the box."""
    position = np.asarray(evidence.cameras.c2w)[evidence.training][:, :, 3]
    distance = float(np.median(np.linalg.norm(position - 0.5, axis=1))) if len(position) else 0.0
    if distance < FAR:
        return None
    return Finding(
        "far_cameras",
        f"the cameras stand {distance:.0f} sides of the scene's box away from its middle",
        "if the scene is as large as that, raise scene.box_side by --override; detail is as fine as the box is small",
    )


def geometry_checks(evidence: Evidence, agreement: Agreement | None) -> Iterator[Finding | None]:
    """All of them; where the cameras are misread, nothing else is said of where they are."""
    if misread := misread_cameras(agreement):
        yield misread
        return
    yield pose_outliers(evidence, agreement)
    yield rounded_poses(evidence, agreement)
    yield no_parallax(evidence, agreement)
    if unseen := unseen_box(evidence):
        yield unseen
        return
    yield missed_box(evidence)
    yield far_cameras(evidence)
