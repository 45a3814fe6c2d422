"""A checkpoint that answers over HTTP, in batches of what comes in together and with limits on every request."""
