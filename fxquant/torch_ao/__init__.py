"""For users of torch.ao: its names, what its models hold, and their conversion."""
