"""Asking an endpoint that speaks OpenAI's protocol: many requests, each paid for once, kept on the disk."""
