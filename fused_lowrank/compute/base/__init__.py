"""W of frozen linear layers where it is no plain matrix: quantised, or known by calls alone.

protocol      what the equation needs of such a W: `Base`
fourbit       bitsandbytes' Linear4bit
eightbit      bitsandbytes' Linear8bitLt
torchao       torchao's subclasses, quantised again as they were
subclass      weights that are a tensor subclass which can be dequantised: torchao's
requantise    W + ΔW stored as W is, and what is lost by that
kinds         which of these a module is, or why it is none
"""
