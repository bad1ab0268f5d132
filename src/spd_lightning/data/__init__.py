"""From any chat corpus to token batches that are right: the way of a row, in reading order.

sources (rows and where they stand) -> conversations (one shape for every format) -> cleaning (filters, what is bad, the
held-out part) -> chat (tokens and assistant turns) -> store (tokenised once) -> batches (packed or padded); and the
steps beside it: prepare, preview, regenerate, vocabulary. Nothing here knows of Lightning.
"""
