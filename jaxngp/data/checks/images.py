"""Checks of the images of a capture, and of what goes with them: alpha, masks, depth maps, exposure, sharpness.

Each returns a finding, or None where there is nothing to say or too little to say it of.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from jaxngp.config import InputError
from jaxngp.data.capture import DepthMap
from jaxngp.data.checks.agreement import Agreement, camera_rays
from jaxngp.data.checks.evidence import Evidence, Picture
from jaxngp.data.checks.features import blurred
from jaxngp.data.checks.finding import Finding, counted
from jaxngp.data.depths import read_depth

# Alpha and pixel formats.


def premultiplied(evidence: Evidence) -> Finding | None:
    """Colour that is never above alpha where alpha is partial, though the scene is not dark."""
    pictures = _of_training(evidence)
    if not evidence.has_alpha or not pictures:
        return None
    partial = np.concatenate([picture.partial for picture in pictures]).astype(np.int16)
    opaque = np.concatenate([picture.rgba[picture.visible][::7, :3].max(axis=-1) for picture in pictures])
    if len(partial) < 200 or not opaque.size:
        return None
    above = float(np.mean(partial[:, :3].max(axis=-1) > partial[:, 3] + 2))
    if above > 1e-3 or np.mean(opaque > 128) < 0.1:
        return None
    return Finding(
        "premultiplied",
        "the images look as if their colour were multiplied by alpha: where alpha is partial no colour is above it, "
        f"in {len(partial)} pixels",
        "straight alpha is expected, as PNG has it; export them that way, or edges will be dark",
    )


def transparent(evidence: Evidence) -> Finding | None:
    """Images that show nothing."""
    empty = [v for v, picture in sorted(evidence.pictures.items()) if picture.rgba[..., 3].max() == 0]
    if not empty:
        return None
    looked = len(evidence.pictures)
    return Finding(
        "transparent",
        f"{'all' if len(empty) == looked else len(empty)} of the {looked} images that were looked at are wholly "
        f"transparent: {evidence.named(empty)}",
        "render them again with an alpha channel that is 1 where the scene is, save them without alpha, or leave "
        "them out",
        tuple(empty),
    )


def sixteen_bits(evidence: Evidence) -> Finding | None:
    """Images of more than 8 bits per channel, of which 8 are used."""
    deep = [v for v, picture in sorted(evidence.pictures.items()) if picture.bits > 8]
    if not deep:
        return None
    return Finding(
        "sixteen_bits",
        f"{counted(len(deep), 'image')} of 16 bits per channel, such as {evidence.names[deep[0]]}; "
        "8 of them are used, as sRGB",
        "nothing, if they are encoded as sRGB; linear or logarithmic ones have to be developed to 8-bit sRGB first",
    )


def linear(evidence: Evidence) -> Finding | None:
    """Images whose values are proportional to light, by their own word, or by being dark and of 16 bits."""
    pictures = _of_training(evidence)
    said = [picture for picture in pictures if abs(picture.gamma - 1) < 0.05]
    deep = [picture for picture in pictures if picture.bits > 8]
    if said:
        reason = f"{len(said)} of {len(pictures)} files say so (gAMA = 1)"
    elif deep and (middle := _median_grey(deep)) < DARK:
        reason = f"they have 16 bits per channel and half of what they show is darker than {middle:.0%} of white"
    else:
        return None
    return Finding(
        "linear",
        f"the images seem to be linear, not sRGB: {reason}",
        "convert them to sRGB, or dark parts lose their detail and edges become wrong",
    )


DARK = 0.25  # of white; half of what a photograph in sRGB shows is brighter than that


def _median_grey(pictures: Sequence[Picture]) -> float:
    shown = [picture.grey()[picture.visible] for picture in pictures]
    return float(np.median(np.concatenate(shown))) if any(part.size for part in shown) else 1.0


def _of_training(evidence: Evidence) -> list[Picture]:
    return [evidence.pictures[view] for view in evidence.training.tolist() if view in evidence.pictures]


# One image among the others.


def duplicates(evidence: Evidence) -> Finding | None:
    """Training images of the same content."""
    training = set(evidence.training.tolist())
    groups = [group for same in _same_content(evidence) if len(group := [v for v in same if v in training]) > 1]
    if not groups:
        return None
    poses = np.asarray(evidence.poses)
    moved = any(np.abs(poses[group] - poses[group[0]]).max() > 1e-4 for group in groups)
    return Finding(
        "duplicates",
        f"{counted(sum(map(len, groups)) - len(groups), 'training image')} like another, such as "
        f"{' = '.join(evidence.names[view] for view in groups[0][:3])}" + (", with other poses" if moved else ""),
        "leave the copies out" + (": at most one of their poses can be right" if moved else ""),
        tuple(view for group in groups for view in group),
    )


def shared_views(evidence: Evidence) -> Finding | None:
    """Views to evaluate on that are among those to train on, by their pose or by their image."""
    training = evidence.training
    others = np.setdiff1d(np.arange(len(evidence.names)), training)
    if not len(others) or not len(training):
        return None
    poses = np.asarray(evidence.cameras.c2w, np.float64).reshape(len(evidence.names), -1)
    same = {view for view in others.tolist() if np.abs(poses[training] - poses[view]).max(axis=1).min() < 1e-6}
    by_pose = len(same)
    copies = {view for group in _same_content(evidence) if set(group) & {*training.tolist()} for view in group}
    same |= copies & {*others.tolist()}
    if not same:
        return None
    split = " and ".join(dict.fromkeys(evidence.splits[view] for view in sorted(same)))
    what = "have the pose of a training view" if by_pose == len(same) else "show the image of a training view"
    return Finding(
        "shared_views",
        f"{len(same)} of the {len(others)} {split} views {what}, such as {evidence.names[min(same)]}",
        "their PSNR measures memorisation, not generalisation; take them out of one of the splits",
        tuple(sorted(same)),
    )


def _same_content(evidence: Evidence) -> list[list[int]]:
    """Groups of views whose files, or whose pictures where there is no file, are the same."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    if evidence.files:
        sizes: dict[int, list[int]] = defaultdict(list)
        for view, file in enumerate(evidence.files):
            sizes[file.stat().st_size].append(view)
        for views in sizes.values():
            for view in views if len(views) > 1 else ():
                groups[hashlib.blake2b(evidence.files[view].read_bytes(), digest_size=16).digest()].append(view)
    for view, picture in evidence.pictures.items():
        if picture.visible.any() and picture.grey()[picture.visible].std() > 0.02:  # it shows something
            groups[picture.rgba.tobytes()].append(view)
    return [sorted(set(group)) for group in groups.values() if len(set(group)) > 1]


LESS_SHARP = (0.7, 6.0)  # in natural logarithms, and in median deviations from the median, at least


def blurred_views(evidence: Evidence) -> Finding | None:
    """Images that are far less sharp than the others."""
    known = [(v, picture.sharpness) for v, picture in sorted(evidence.pictures.items()) if picture.sharpness > 0]
    if len(known) < 6:
        return None
    views, values = zip(*known, strict=True)
    sharpness = np.log(values)
    middle = np.median(sharpness)
    limit = max(LESS_SHARP[0], LESS_SHARP[1] * float(np.median(np.abs(sharpness - middle))))
    soft = [views[i] for i in np.argsort(sharpness) if sharpness[i] < middle - limit]
    if not soft:
        return None
    least = np.exp(sharpness.min() - middle)
    return Finding(
        "blurred",
        f"{len(soft)} of {len(views)} images are far less sharp than the others: {evidence.named(soft)} "
        f"({least:.0%} of the usual fine detail)",
        "leave them out, or they blur the scene where they look",
        tuple(soft),
    )


GAINS = 2.0  # the brightest image is that much brighter than the darkest, of the same things


def exposure_gains(evidence: Evidence, agreement: Agreement) -> dict[int, float]:
    """By how much each view shows the same things brighter than the mean view, by matches; as sRGB values."""
    matches = agreement.matches
    smooth = {view: blurred(evidence.pictures[view].grey(), 2.0) for view in np.unique(matches.views).tolist()}
    value = np.empty(matches.views.shape)
    for view, grey in smooth.items():
        mine = matches.views == view
        x, y = matches.pixels[mine].T
        value[mine] = grey[np.minimum(y, grey.shape[0] - 1), np.minimum(x, grey.shape[1] - 1)]
    ratio = np.log((value[1] + 0.02) / (value[0] + 0.02))
    views = sorted(smooth)
    number = {view: i for i, view in enumerate(views)}
    starts = np.flatnonzero(np.diff(matches.pair, prepend=-1))
    rows = np.zeros((len(starts), len(views)))
    for row, (i, j) in zip(rows, matches.views[:, starts].T.tolist(), strict=True):
        row[number[j]], row[number[i]] = 1, -1
    middle = np.array([np.median(part) for part in np.split(ratio, starts[1:])])
    # Held at 0 a little, since only differences are known.
    system, wanted = np.concatenate([rows, 0.05 * np.eye(len(views))]), np.concatenate([middle, np.zeros(len(views))])
    return dict(zip(views, np.exp(np.linalg.lstsq(system, wanted, rcond=None)[0]).tolist(), strict=True))


def exposure(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Images that show the same things far brighter or darker than others do."""
    if agreement is None:
        return None
    gains = exposure_gains(evidence, agreement)
    views = sorted(gains, key=gains.__getitem__)
    spread = gains[views[-1]] / gains[views[0]]
    if spread < GAINS:
        return None
    return Finding(
        "exposure",
        f"the exposure differs: {evidence.named(views[-1:])} shows the same things {spread:.1f} times as bright as "
        f"{evidence.named(views[:1])}",
        "develop the photographs with one exposure and white balance, or leave out those that differ; otherwise the "
        "difference is learned as fog and as a colour that changes with the view",
        (views[0], views[-1]),
    )


# Masks and depths.

CENTRE_MASKED = 0.8  # of the views
SCENE_MASKED = 0.1  # of the matches that fit
STILL = 0.5  # of the share that fits elsewhere; what moves fits hardly ever


def inverted_masks(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Masks that leave out what the cameras look at, and with it most of what agrees in several pictures."""
    masks = {v: keep for v, picture in sorted(evidence.pictures.items()) if (keep := picture.keep) is not None}
    if agreement is None or len(masks) < 4:
        return None
    meeting, matches = agreement.better_meeting, agreement.matches
    kept = np.ones(matches.views.shape, bool)
    for view, keep in masks.items():
        mine = matches.views == view
        x, y = matches.pixels[mine].T
        kept[mine] = keep[np.minimum(y, keep.shape[0] - 1), np.minimum(x, keep.shape[1] - 1)]
    outside, inside = ~kept[0] & ~kept[1], kept[0] & kept[1]
    if (outside & meeting.fits).sum() < 100:
        return None
    scene = float(np.mean(outside[meeting.fits]))
    # What moves is masked rightly, though it is in the middle: it fits less than the rest does.
    rates = float(meeting.fits[outside].mean()), float(meeting.fits[inside].mean()) if inside.any() else 0.0
    out = [keep for keep in masks.values() if not _keeps_centre(keep)]
    if len(out) < CENTRE_MASKED * len(masks) or scene < SCENE_MASKED or rates[0] < STILL * rates[1]:
        return None
    share = np.mean([keep.mean() for keep in masks.values()])
    return Finding(
        "inverted_mask",
        f"the masks seem to be inverted: they leave out the middle of {len(out)} of {len(masks)} images, and "
        f"{scene:.0%} of what agrees between pictures and so does not move; {share:.0%} of the pixels are left",
        "invert them: black is left out by mask_path of nerfstudio, and kept in dynamic_mask_*.png of instant-ngp",
    )


def _keeps_centre(keep: np.ndarray) -> bool:
    height, width = keep.shape
    middle = keep[round(0.4 * height) : round(0.6 * height) + 1, round(0.4 * width) : round(0.6 * width) + 1]
    return bool(middle.mean() > 0.5)


WRONG_SCALE = 1.3  # by so much or more depths are off


def depth_unit(evidence: Evidence, agreement: Agreement | None) -> Finding | None:
    """Depth maps whose values are not where the rays of matches meet."""
    if agreement is None or not any(evidence.depths):
        return None
    matches, meeting = agreement.matches, agreement.better_meeting
    sound = meeting.fits & (meeting.angle > np.radians(2))
    rays = camera_rays(evidence.cameras, matches)
    ratios = []
    for view in np.unique(matches.views).tolist():
        depth = evidence.depths[view]
        if depth is None or (stored := _stored_depth(depth)) is None:
            continue
        for side in (0, 1):
            mine = sound & (matches.views[side] == view)
            x, y = matches.xy[side][mine].T
            height, width = stored.shape
            value = stored[(y * height).astype(int).clip(0, height - 1), (x * width).astype(int).clip(0, width - 1)]
            along = -rays[side][mine, 2] if depth.along == "axis" else 1.0
            met = meeting.distance[side][mine] * along
            with np.errstate(all="ignore"):
                ratio = value.astype(np.float64) * depth.unit / met
            ratios.append(ratio[np.isfinite(ratio) & (ratio > 0)])
    found = np.log(np.concatenate(ratios)) if ratios else np.zeros(0)
    if len(found) < 50:
        return None
    middle = float(np.median(found))
    spread = float(np.median(np.abs(found - middle)))
    if abs(middle) < np.log(WRONG_SCALE) or spread > 0.3 * abs(middle):
        return None
    factor = np.exp(middle)
    thousand = abs(abs(middle) - np.log(1000)) < 0.3
    hint = "; millimetres and metres are confused" if thousand else ""
    return Finding(
        "depth_unit",
        f"the depth maps are {_times(factor)} what the cameras say, by {len(found)} points that two pictures agree on"
        f"{hint}",
        "correct their unit (integer_depth_scale of instant-ngp; nerfstudio expects millimetres, and applied_scale), "
        "or the scale of the poses",
    )


def _times(factor: float) -> str:
    return f"{factor:.3g} times" if factor >= 1 else f"1/{1 / factor:.3g} of"


def _stored_depth(depth: DepthMap) -> np.ndarray | None:
    """The values (H, W) of a depth map as it stores them; None where it cannot be read."""
    try:
        return read_depth(depth.file)
    except InputError:  # as whoever reads all of them says
        return None


def image_checks(evidence: Evidence, agreement: Agreement | None) -> Iterator[Finding | None]:
    """All of them."""
    yield transparent(evidence)
    yield premultiplied(evidence)
    yield sixteen_bits(evidence)
    yield linear(evidence)
    yield duplicates(evidence)
    yield shared_views(evidence)
    yield blurred_views(evidence)
    yield exposure(evidence, agreement)
    yield inverted_masks(evidence, agreement)
    yield depth_unit(evidence, agreement)
