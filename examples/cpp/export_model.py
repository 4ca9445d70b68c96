"""Quantize a small model and write the package that run_model runs: python export_model.py model.pt2.

Prints the model's outputs for ones of shape (2, 32), as run_model does.
"""

import sys

import torch
from torch import nn

import fxquant


def main(path: str) -> None:
    """Write the package."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    x = torch.ones(2, 32)
    quantized = fxquant.quantize_dynamic(model)
    with torch.no_grad():
        exported = torch.export.export(quantized, (x,))
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        outputs = quantized(x)
    sys.stdout.write(" ".join(f"{value:.6f}" for value in outputs.flatten().tolist()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
