"""What refinement did to the cameras of a run: a table, a drawing, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Cameras, PosedImages, focus, unproject
from jaxngp.config import NerfConfig
from jaxngp.data import Split
from jaxngp.diagram import Colour, Drawing, Group, draw, frusta
from jaxngp.lenses import make_lens
from jaxngp.pictures import write_png
from jaxngp.records import write_json
from jaxngp.refinement import DIVERGED, align, exposed, log_gain, pose_errors, refined_cameras
from jaxngp.registration import over_white
from jaxngp.rendering import render_ray_grid
from jaxngp.training.loop import Progress

PIXELS = 2**9  # of each view, whose colours are compared
FAR = (DIVERGED, 0.25)  # degrees, and distances to the middle of the scene
ODD_DB = 6.0  # below the median PSNR: a view that the scene does not explain
ODD_MOVE = 6.0  # times the median move: a view that went where no other did
FOLD = 0.05  # px by which a refined lens may miss, as of a lens that is read
SHOWN = 5
_GIVEN: Colour = (150, 156, 166)
_REFINED: Colour = (43, 98, 201)


@dataclass(frozen=True, eq=False)
class CameraReport:
    """Moves and residuals of V views. Moves are after the gauge is taken out; see `refinement.align`."""

    names: tuple[str, ...]
    degrees: np.ndarray  # (V,)
    distance: np.ndarray  # (V,) world units
    share: np.ndarray  # (V,) the same, in distances to the middle of the scene
    focal: np.ndarray  # (V,) refined over given
    psnr: np.ndarray  # (V,) dB, of some pixels of each view
    stops: np.ndarray | None  # (V, 3) exposure of red, green and blue; None where it is not refined
    gauge: dict[str, float]  # by what all cameras together moved
    folds: bool = False  # whether a refined lens is not invertible over its image

    @property
    def warnings(self) -> list[str]:
        """What looks wrong, and what to do."""
        found = []
        if not np.isfinite(self.degrees).all() or (np.median(self.degrees) > FAR[0] or np.median(self.share) > FAR[1]):
            found.append(
                f"refinement has probably diverged: half of the cameras moved by more than "
                f"{np.median(self.degrees):.1f} degrees or {np.median(self.share):.0%} of their distance. Train from "
                "scratch without --refine, or with a lower refine.learning_rate or fewer refine.coarse_levels"
            )
        if self.folds:
            found.append(
                "a refined lens folds over inside its image, and other programs will refuse it: train from scratch "
                "with a lower refine.learning_rate, or without --refine=lens"
            )
        if odd := self._odd():
            more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
            found.append(
                f"views that disagree with the others: {', '.join(odd[:SHOWN])}{more}. Their cameras or exposures are "
                "probably wrong, or something moved in them: leave them out, or mask what moved"
            )
        return found

    def _odd(self) -> list[str]:
        """What is odd about each odd view, the worst first."""
        low = self.psnr < np.median(self.psnr) - ODD_DB
        moved = (self.degrees > max(ODD_MOVE * np.median(self.degrees), 0.5)) | (
            self.share > max(ODD_MOVE * np.median(self.share), 0.01)
        )
        return [
            f"{self.names[view]} ({self.psnr[view]:.1f} dB, moved {self.degrees[view]:.2f} degrees)"
            for view in np.argsort(self.psnr)
            if low[view] or moved[view]
        ]

    def __str__(self) -> str:
        parts = [
            f"cameras refined: moved {np.median(self.degrees):.3f} degrees and {np.median(self.share):.2%} of their "
            f"distance (median; largest {np.max(self.degrees):.3f} and {np.max(self.share):.2%})"
        ]
        if np.ptp(self.focal) or self.focal[0] != 1:
            parts.append(f"focal length x {np.median(self.focal):.5f}")
        if self.stops is not None:
            parts.append(f"exposures within {np.abs(self.stops.mean(axis=1)).max():.2f} stops")
        return ", ".join(parts)


def write(workdir: Path, training: Split, progress: Progress) -> CameraReport:
    """The report on a run; writes cameras.json and cameras.png into its workdir."""
    images, learned, config = training.images, progress.state.refinement, progress.config
    assert isinstance(images, PosedImages)
    assert isinstance(config, NerfConfig)
    assert learned is not None
    given: Cameras = jax.tree.map(np.asarray, images.cameras)
    refined = refined_cameras(given, learned, refine=config.refine)
    gauge = align(refined.c2w, given.c2w)
    aligned = refined.replace(c2w=gauge.poses(refined.c2w))  # type: ignore[attr-defined]
    degrees, distance = pose_errors(aligned.c2w, given.c2w)
    gain = None if learned.free.log_gain is None else np.asarray(log_gain(learned))
    turned = pose_errors(np.eye(3, 4)[None], np.concatenate([gauge.rotation, np.zeros((3, 1))], axis=1)[None])[0]
    report = CameraReport(
        names=training.views,
        degrees=degrees,
        distance=distance * training.transform.side,
        share=distance / np.maximum(np.linalg.norm(np.asarray(given.c2w)[:, :, 3] - 0.5, axis=1), 1e-6),
        focal=np.asarray(refined.focal_xy)[:, 0] / np.asarray(given.focal_xy)[:, 0],
        psnr=view_psnr(images, refined, gain, progress),
        stops=None if gain is None else gain / np.log(2),
        gauge={
            "degrees": float(turned[0]),
            "scale": gauge.scale,
            "distance": float(np.linalg.norm(gauge.poses(np.full((3, 4), 0.5))[:, 3] - 0.5)) * training.transform.side,
        },
    )
    if (lens := refined.lens) is not None:
        shape = {"focal_xy": refined.focal_xy, "centre_xy": refined.centre_xy, "size": refined.size}
        misses = make_lens(lens.model, lens.coefficients, **shape)[1]  # px
        report = replace(report, folds=bool(np.max(misses) > FOLD))
    write_json(workdir / "cameras.json", _plain(report, refined))
    name = Path(config.scene.name).stem
    write_png(workdir / "cameras.png", picture(given, aligned, report, training, name))
    return report


def view_psnr(images: PosedImages, cameras: Cameras, gain: np.ndarray | None, progress: Progress) -> np.ndarray:
    """(V,) dB: how well the scene explains PIXELS pixels of each view, over white."""
    rng = np.random.default_rng(0)
    places, truths = [], []
    for view in range(len(cameras)):
        image, keep = images.image(view), images.mask(view)
        y, x = np.nonzero(np.ones(image.shape[:2], bool) if keep is None else keep)
        some = rng.integers(0, len(x), PIXELS)
        places.append(np.stack([x[some], y[some]], axis=-1) + 0.5)
        truths.append(over_white(image[y[some], x[some]]))
    many = jax.tree.map(lambda a: np.repeat(np.asarray(a)[:, None], PIXELS, axis=1), cameras)
    rays = unproject(many, jnp.asarray(np.stack(places), jnp.float32))
    sampler = progress.config.sampler  # type: ignore[union-attr]
    out = render_ray_grid(progress.field, rays, progress.state.occupancy, jnp.ones(3), sampler=sampler)
    rgb = np.asarray(out.rgb)
    if gain is not None:
        rgb = np.asarray(exposed(rgb, np.asarray(out.opacity), np.ones(3, np.float32), gain[:, None]))
    return -10 * np.log10(np.maximum(np.mean((np.clip(rgb, 0, 1) - np.stack(truths)) ** 2, axis=(1, 2)), 1e-10))


def picture(given: Cameras, refined: Cameras, report: CameraReport, training: Split, name: str) -> np.ndarray:
    """The cameras before and after, (H, W, 3) u8; the gauge is taken out."""
    groups = [
        Group(label, colour, frusta(cameras), np.asarray(cameras.c2w)[:, :, 1])
        for label, colour, cameras in (("as given", _GIVEN, given), ("refined", _REFINED, refined))
    ]
    most = np.argsort(report.degrees)[::-1][:SHOWN]
    labels = {f"{report.names[view]} {report.degrees[view]:.2f}°": groups[1].corners[view, 0] for view in most}
    none: Sequence[Any] = np.zeros((0, 3))  # type: ignore[assignment]
    drawing = Drawing(
        groups, np.asarray(none), np.zeros((0, 3), np.uint8), focus(np.asarray(given.c2w)),
        training.placement.num_cascades, training.transform.side, f"{name}: {report}",
        "diverged or odd views" if report.warnings else "", labels,
    )  # fmt: skip
    return draw(drawing)


def _plain(report: CameraReport, refined: Cameras) -> dict[str, Any]:
    lens = refined.lens
    rows = []
    for view, name in enumerate(report.names):
        row: dict[str, Any] = {"view": name}
        for field in ("degrees", "distance", "share", "focal", "psnr"):
            row[field] = float(getattr(report, field)[view])
        if report.stops is not None:
            row["stops"] = report.stops[view].tolist()
        if lens is not None:
            row["lens"] = np.asarray(lens.coefficients)[view].tolist()
        rows.append(row)
    return {"summary": str(report), "gauge": report.gauge, "warnings": report.warnings, "views": rows}
