"""The built-in scene: a toy harbour of studded bricks, drawn by an analytic ray caster of its own.

    harbour.build_parts --> Part (boxes, frusta, spheres) --> casting.baked_toy (arrays and sky light)
                                                                        |
    pictures.bricks_cameras --> pictures.write_scene (PNGs, json) <-- shading.cast_rays

Every part is convex and its nearest hit is closed form, so colour, alpha, depth and normal are exact. Shading is
linear light (one sun with hard shadows, a sky, gloss) and leaves as sRGB. A picture averages sRGB *multiplied by
alpha* over its subsamples, which is what a volume renderer that composites in sRGB can reproduce exactly.
"""

from jaxngp.data.bricks.parts import BRICKS_BOUNDS
from jaxngp.data.bricks.pictures import bricks_cameras, write_scene
from jaxngp.data.bricks.shading import Surface, cast_rays

__all__ = ["BRICKS_BOUNDS", "Surface", "bricks_cameras", "cast_rays", "write_scene"]
