"""Talk with a model: at a terminal, in a pipe, or one question from the command line (docs/chat.md)."""
