"""vflax's server under a public evaluation harness (README.md)."""
