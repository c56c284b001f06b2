"""Ray tables."""
from __future__ import annotations
from pathlib import Path
import jax
from flax import struct
from jaxngp.cameras import Rays

@struct.dataclass
class RayTable:
    rays: Rays
    rgb: jax.Array
    width: int = struct.field(pytree_node=False)
    height: int = struct.field(pytree_node=False)
