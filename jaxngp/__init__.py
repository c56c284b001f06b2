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

Units: scene units, in which the scene's box is the cube [0, 1]^3; t is the distance along a ray of unit direction;
density is per scene unit; rgb is sRGB in [0, 1].
"""

__version__ = "0.1.0"
