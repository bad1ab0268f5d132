"""The frozen target: loading, stage partition, capture of anchor states, a cache that rolls back."""
