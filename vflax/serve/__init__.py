"""A server for a model, in OpenAI's protocol: python -m vflax.serve (docs/serving.md)."""
