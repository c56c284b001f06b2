"""Camera paths made in the viewer: key frames, the cameras between them, and nerfstudio's JSON for both."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras, interpolate_poses, make_cameras
from jaxngp.config import InputError
from jaxngp.data import SceneTransform

MAX_SIDE = 2**13  # px, of a frame


@dataclass(frozen=True, eq=False)
class CameraPath:
    """Key frames, and how the camera flies through them at an even speed."""

    keys: tuple[np.ndarray, ...] = ()  # c2w (3, 4) each, scene units
    fov: float = math.radians(50)  # of the height
    seconds: float = 4.0
    fps: float = 24.0
    width: int = 960  # px, of a frame
    height: int = 540

    @property
    def num_frames(self) -> int:
        return max(1, round(self.seconds * self.fps)) if self.keys else 0

    def added(self, c2w: np.ndarray) -> CameraPath:
        """With one more key frame, the last."""
        return replace(self, keys=(*self.keys, np.asarray(c2w, np.float64)))

    def removed(self, number: int) -> CameraPath:
        """Without one of the key frames."""
        return replace(self, keys=self.keys[:number] + self.keys[number + 1 :])

    def cameras(self) -> Cameras:
        """The camera of every frame, (num_frames,), on a smooth curve through the key frames."""
        poses = np.zeros((0, 3, 4))
        if self.keys:
            poses = interpolate_poses(np.stack(self.keys), self.num_frames, num_keys=len(self.keys))
        focal = self.height / (2 * math.tan(self.fov / 2))
        centre = (self.width / 2, self.height / 2)
        return make_cameras(poses, focal_xy=(focal, focal), centre_xy=centre, width=self.width, height=self.height)

    def to_json(self, transform: SceneTransform) -> str:
        """The path in nerfstudio's format, poses in the coordinates of the scene's source."""
        fov, aspect = math.degrees(self.fov), self.width / self.height

        def matrix(c2w: np.ndarray) -> list[float]:
            return [*transform.pose_to_world(np.asarray(c2w)).ravel().tolist(), 0.0, 0.0, 0.0, 1.0]

        keys = [{"matrix": json.dumps(matrix(key)), "fov": fov, "aspect": aspect} for key in self.keys]
        frames = [{"camera_to_world": matrix(c2w), "fov": fov, "aspect": aspect} for c2w in self.cameras().c2w]
        top: dict[str, Any] = {
            "camera_type": "perspective",
            "coordinates": "source",  # which nerfstudio's own files do not say, and are not in
            "render_height": self.height,
            "render_width": self.width,
            "fps": self.fps,
            "seconds": self.seconds,
            "is_cycle": False,
            "smoothness_value": 0.0,
            "crop": None,
            "keyframes": keys,
            "camera_path": frames,
        }
        return json.dumps(top, indent=1)

    @classmethod
    def from_json(cls, text: str, transform: SceneTransform) -> CameraPath:
        """The path that `to_json` described. Raises InputError for anything else."""
        try:
            top = json.loads(text)
            matrices = [np.array(json.loads(key["matrix"]), np.float64).reshape(4, 4) for key in top["keyframes"]]
            keys = tuple(transform.pose_to_scene(matrix[:3]) for matrix in matrices)
            fov = math.radians(float(top["keyframes"][0]["fov"]))
            size = {"width": int(top["render_width"]), "height": int(top["render_height"])}
            path = cls(keys, fov, float(top["seconds"]), float(top["fps"]), **size)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise InputError(f"no camera path of the viewer ({error!r}); give a file that it exported") from None
        poses, numbers = np.stack(path.keys), np.array([path.fov, path.seconds, path.fps, path.width, path.height])
        sound = np.isfinite(poses).all() and np.allclose(poses[..., :3] @ poses[..., :3].mT, np.eye(3), atol=1e-3)
        limits = (math.pi, 1e4, 1e3, MAX_SIDE + 1, MAX_SIDE + 1)
        if not (sound and np.all((numbers > 0) & (numbers < limits))):
            raise InputError("the camera path has a value that is out of range; give a file that the viewer exported")
        return path
