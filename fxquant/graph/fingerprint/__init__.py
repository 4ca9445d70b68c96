"""What determines a float model's outputs besides its tensors, so that a file can recognize another model."""
