"""How a pass multiplies: precisions of linear maps, and kernels between them."""
