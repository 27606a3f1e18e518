"""Numbers that several parts share; this file imports nothing."""

# Ids that mark places in a sequence lie outside every vocabulary. This one stands where an image's features go; its
# value is LLaVA's (llava/constants.py IMAGE_TOKEN_INDEX).
IMAGE_TOKEN_ID = -200
# A label that the loss does not count. The value is PyTorch's cross-entropy default, as in LLaVA.
IGNORE_LABEL = -100
# A command's exit status: finished; an error; saved, to be run again.
EXIT_DONE, EXIT_ERROR, EXIT_AGAIN = 0, 1, 75
GIB = 2**30
# Seconds in which a connection to a bucket, or the next byte of an answer, must come. A server that is up answers in
# well under one; one that is overloaded answers with an error, which is tried again. Without a limit a request that the
# network has lost holds a host, and with it all that wait for this host, for ever.
GS_TIME_LIMIT = 30
# Of a TPU's registers and matrix unit: an axis that is no multiple of them is filled up.
LANES = 128
