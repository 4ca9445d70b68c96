"""Fifth pass and last: quantized modules and operators take the float ones' places, and what is unused goes."""
