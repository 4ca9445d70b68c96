"""Fifth pass and last: quantized modules and operators replace the float ones, and what is unused is removed."""
