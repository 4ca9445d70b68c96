"""save and load: one safetensors file that holds a quantized model's tensors and the plan that made it.

files.py: the file, written and read. plan.py: what a model remembers, as JSON. rebuild.py: a model without data, from
the plan and the float architecture; checks of the file's tensors.
"""

from fxquant.checkpoint.files import load, save
from fxquant.checkpoint.plan import FORMAT

__all__ = ["FORMAT", "load", "save"]
