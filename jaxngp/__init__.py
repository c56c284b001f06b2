"""jaxngp: instant neural graphics primitives as plain JAX functions.

The way of a ray:

    pixel --cameras--> Rays --marching (+ OccupancyGrid, jitter)--> Samples (packed) --encodings--> features
                                                                       |                              |
                                                                       |                           fields
                                                                   ray index                          |
                                                                       v                              v
                 scalar <--losses-- RenderOutput <---------------- compositing <--------------- density, rgb

    flags -> Config -> (data, state0) -> [ step : state -> state, metrics ]* -> metrics.jsonl, checkpoints/, renders/

`rendering.render_rays` is the upper picture as code, `train` the lower. Every stage is a module of pure functions:
`cameras`, `hashing`, `encodings`, `occupancy`, `carving`, `fields`, `marching`, `compositing`, `rendering`, then `data`
and `training`. A module imports only modules that come before it, and importing one touches no device.

The other primitives need no rays to be learned:

    position --encodings--> features --fields--> colour of an image, or signed distance --losses--> scalar

`images` says which pixels a position means, `tracing` walks along rays to the surface of a signed distance, `meshing`
turns it into triangles. `training` is the same for all three.

Units: scene units, in which the scene's box is the cube [0, 1]^3, as it is that of a solid, and an image is the square
[0, 1]^2; t is the distance along a ray of unit direction; density is per scene unit; rgb is sRGB in [0, 1].
"""

__version__ = "0.1.0"
