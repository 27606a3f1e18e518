"""vflax: train, evaluate, serve and export LLaVA-architecture vision-language models in JAX."""

__version__ = "0.1.0"
