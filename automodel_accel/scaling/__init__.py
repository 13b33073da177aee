"""What a run needs of each GPU, on paper: bytes of memory, and bytes that travel, from a model's shapes and a mesh.

`shape` reads a model on the meta device, `memory` and `traffic` hold the formulae, `fitting` looks for a mesh that fits.
"""
