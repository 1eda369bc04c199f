"""Programs beside the method: they use all of it, and nothing of it needs them."""
