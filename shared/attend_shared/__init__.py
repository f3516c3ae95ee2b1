"""What no framework owns: the meaning of a call, its checks and errors, the oracle, and the comparison.

`attend_torch` and `attend_jax` stand on this package; someone who tests an attention of their own can use it alone.
It needs NumPy, einops and packaging, and imports neither torch nor JAX.
"""

from attend_shared.choice import Explanation, Implementation
from attend_shared.errors import UnsupportedError

__all__ = ["Explanation", "Implementation", "UnsupportedError"]
