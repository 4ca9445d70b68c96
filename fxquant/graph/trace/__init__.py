"""First pass: a float model becomes a graph that computes exactly what the model does."""
