"""Ids that mark places in a sequence; both lie outside every vocabulary."""

# Stands where an image's features go. The value is LLaVA's (llava/constants.py IMAGE_TOKEN_INDEX).
IMAGE_TOKEN_ID = -200
# A label that the loss does not count. The value is PyTorch's cross-entropy default, as in LLaVA.
IGNORE_LABEL = -100
