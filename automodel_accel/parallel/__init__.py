"""Over many processes: `Mesh` lays them out, `apply(model, mesh=...)` puts the wrappers on in their order."""

from automodel_accel.parallel.gradients import accumulate, clip_grad_norm_
from automodel_accel.parallel.mesh import Mesh, Ranks
from automodel_accel.parallel.meta import draw_sharded, load_sharded

__all__ = ["Mesh", "Ranks", "accumulate", "clip_grad_norm_", "draw_sharded", "load_sharded"]
