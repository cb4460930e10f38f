"""The methods, a file each: the row, the reference layer in plain PyTorch and its fused drop-in."""
