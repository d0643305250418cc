"""What a model is worth: metrics over all workers, significance, result tables."""
