"""A page for the browser that shows a dataset: tasks, pictures, and the prompts as the model sees them.

See data_pipeline.browse.__main__ for the command line and docs/browse.md.
"""

from __future__ import annotations

from data_pipeline.browse.site import write_site

__all__ = ["write_site"]
