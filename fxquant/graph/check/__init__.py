"""After convert: the quantized model runs once beside the prepared one, on the example inputs."""
