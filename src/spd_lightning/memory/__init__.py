"""What a training run holds in memory, computed before it starts; integers alone, nothing is allocated."""
