"""The computation of a call: an equation, its operands as an object, plans as rows of a table.

    base              W where it is no plain matrix: quantised, or known by calls alone
    base.protocol     what the equation needs of it
    base.fourbit      bitsandbytes' Linear4bit
    base.eightbit     its Linear8bitLt
    base.torchao      torchao's tensor subclasses, quantised again as they were
    base.subclass     weights that are a tensor subclass: torchao's
    base.requantise   W + ΔW stored as W is, and what is lost by that
    base.dequantised  layers of GPTQ, AWQ and HQQ, which are asked for their values
    base.apart        those whose products are in a narrower dtype than the term
    base.kinds        which of these a module is, or why it is none
    reference         the equation in plain torch, and cores by row (`RowCores`)
    dropout           what a dropout is; a mask from a seed, in plain torch; columns of u dropped
    gain              a gain over outputs by library operations, and its way back
    isolation         library products in which no row reads another
    devices           what can run where, and which tiles a device takes
    operands          Operands of a pass, and the Problem that a plan is chosen by
    costs             what work costs on paper, on a device
    measured          what plans took when they were measured, in a file of the user's
    steps             steps, of which plans are made
    steps.library     steps by library products: run, why_not, work
    steps.kernels     steps by this library's kernels
    plans             the table of plans: which steps make a pass
    choose            which plan a pass takes, and why; the one place that decides
    run               a pass by the plan that is chosen for it
    autograd          forward and backward over passes; the library ops of compiled graphs
    base.calls        the same over a W that is no plain matrix

A module imports those above it in this list.
"""
