"""The Triton kernels of fused_lowrank. Import them as `fused_lowrank.kernels`.

    shrink      t = x·downᵀ  and  u = scale · t · core, in one launch
    gemm_tail   y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias, in one launch
    core_grad   dcore = scale · tᵀ·g, or LoRA-Mini's two gradients, in one launch
    decode, relay    a whole pass in one launch: few rows; many rows, on Hopper
    dropped     x where a dropout keeps it
    gain_back   dy ⊙ gain, and the gradient of the gain, in one launch
    core_grad_rows   dcore of each core of a bank, whose rows have each its own, in one launch

Modules here import torch, triton and each other, nothing above them. Importing them needs Triton;
importing this package does not.
"""

if __name__ == "kernels":
    # Found on sys.path from the checkout's root. The bare name belongs to another package, whose
    # presence others probe by importing it: that must not fail, and must find nothing here.
    __path__ = []
