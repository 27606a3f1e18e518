"""vflax: train, evaluate, serve and export LLaVA-architecture vision-language models in JAX."""

__version__ = "0.1.0"

import os as _os

from vflax.constants import GS_TIME_LIMIT as _LIMIT

# TensorStore reads these when it is loaded, so they stand here, before any part of vflax can load it.
_os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(_LIMIT))
_os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_LIMIT))
_os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
