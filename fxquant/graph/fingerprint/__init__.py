"""What of a float model decides its results beside its tensors, so that a file can tell another model's."""
