"""Floor 5: what one operator becomes in one target."""
