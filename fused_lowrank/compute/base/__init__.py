"""W of frozen linear layers where it is no plain matrix: quantised, or known by calls alone.

protocol      what the equation needs of such a W: `Base`
fourbit       bitsandbytes' Linear4bit
eightbit      bitsandbytes' Linear8bitLt
torchao       torchao's subclasses, quantised again as they were
subclass      weights that are tensors which say their values: torchao's, quanto's, fp8 training
requantise    W + ΔW stored as W is, and what is lost by that
dequantised   modules that can be asked for their values: GPTQ's, AWQ's, HQQ's
apart         those whose products are in a narrower dtype than the low-rank term
kinds         which of these a module is, or why it is none
"""
