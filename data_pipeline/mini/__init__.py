"""The built-in mini dataset: all three stages on 64-pixel pictures, made in seconds without a download.

    from data_pipeline import mini
    data = mini.ensure()            # MiniData(root, stage0, stage1, stage2, tokenizer)

What is in it: docs/mini_dataset.md.
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline.mini.layout import MiniData

__all__ = ["MiniData", "ensure", "version"]


def ensure(cache: Path | None = None, scale: float = 1.0) -> MiniData:
    """The mini dataset, made now if it is not in the cache.

    Args:
        cache: the cache folder; None: $VFLAX_CACHE, or ~/.cache/vflax.
        scale: scales the number of samples (tests use a small one); each scale is cached for itself.

    Raises:
        UserError: the cache cannot be written.
    """
    # Here, not above: the processes that draw import this package, and need neither TFDS nor scikit-learn.
    from data_pipeline.mini.build import ensure

    return ensure(cache, scale)


def version(scale: float = 1.0) -> str:
    """The hash that names this dataset: of the generator's source and of the packages that draw and encode."""
    from data_pipeline.mini.build import version

    return version(scale)
