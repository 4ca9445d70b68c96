"""After convert: the quantized model is run once beside the prepared one."""
