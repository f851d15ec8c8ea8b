"""demix_jax: modular language models whose feed-forward experts are text domains.

import demix_jax as demix
lm = demix.load("runs/quick/demix")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demix_jax.api import LanguageModel, from_pretrained, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "from_pretrained", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python front when it is first used, so that `import demix_jax` is cheap."""
    if name in __all__:
        from demix_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'demix_jax' has no attribute {name!r}")
