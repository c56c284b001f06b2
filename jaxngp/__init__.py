"""jaxngp: instant neural graphics primitives as plain JAX functions.

One pixel, in training:

    pixel --cameras--> Rays --marching (occupancy, jitter)--> Samples --encodings--> features --fields--> density, rgb
                                                                                                              |
                                  scalar <--losses-- RenderOutput <-------------- compositing <---------------+

    flags -> config -> (data, state) -> [ step: state -> state, metrics ]* -> workdir: log, checkpoints, pictures

`rendering.render_rays` is the upper picture as code, `train.main` the lower. The modules, each of which imports only
modules above it:

    config, presets, device               choices; what depends on the device
    cameras                               pixels to rays and back
    hashing, encodings                    position or direction -> features
    bitsets, occupancy, visual_hull       which cells of the box may hold density
    fields                                RadianceField, ImageField, DistanceField: callable pytrees
    marching, compositing, rendering      rays -> samples -> colour
    images, tracing, meshing              image between its pixels; signed distance -> picture, triangles
    losses, metrics                       per element; PSNR and SSIM
    data                                  files -> Capture -> views in scene units; images, meshes, shapes
    training                              nerf, image, sdf: one task each; step: shared by all; loop: train()
    records, pictures, diagram, console   what a run writes and shows
    checkpoints, evaluation, runs         state on disk; views beside the truth; a run in its workdir
    flags                                 command lines -> config
    capture, inspect, train, evaluate,    the commands: python -m jaxngp.train
    render, train_image, train_sdf

Units: scene units, in which the scene's box is the cube [0, 1]^3 and an image the square [0, 1]^2; t is the distance
along a ray of unit direction; density is per scene unit; rgb is sRGB in [0, 1]. Importing a module touches no device.
"""

__version__ = "0.1.0"
