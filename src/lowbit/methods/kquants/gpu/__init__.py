"""ggml's searches, sums and rounding as GPU kernels: a lane walks through the weights of its own sub-block.

In PyTorch each of the 16 to 37 trials of a search reads and writes all weights about a dozen times. A lane adds its terms
up in the order of the C and every operation is rounded on its own (no fused multiply-add, divisions to the nearest,
denormals kept), so the results are exactly those of the PyTorch functions of the same names. Element-major as there: a
step of all lanes reads consecutive weights, and what it reads again in the next trial still lies in the caches.
libdevice's own division would flush denormals here, `tl.div_rn` keeps them.
"""

from lowbit.methods.kquants.gpu.affine_kernels import search_affine, search_positive
from lowbit.methods.kquants.gpu.arithmetic_kernels import round_uniform, sequential_sum
from lowbit.methods.kquants.gpu.symmetric_kernels import search_descending, search_symmetric, search_uneven

__all__ = [
    "round_uniform",
    "search_affine",
    "search_descending",
    "search_positive",
    "search_symmetric",
    "search_uneven",
    "sequential_sum",
]
