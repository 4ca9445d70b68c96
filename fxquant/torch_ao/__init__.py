"""The way over from torch.ao.quantization: its names, its models' state, its files."""
