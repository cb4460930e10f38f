"""Many adapters over one base, each row of a batch with its own.

    inputs            names, handles and weights of a call, checked
    tables            the cores of all adapters, by layer and slot
    assignment        the adapters of a call; what `bank.use` returns
    recompute         the assignment of a call that a checkpoint computes again
    shared            the factors that all adapters share, and whether they are what they were
    store             `AdapterStore`: names, slots, generations, and who may still read them
    sources           files, state_dicts and models that adapters come from
    file              a file of many adapters
    training          adapters in training, and their optimiser
    compiled          the ops of a compiled graph
    layer             a layer in a bank
    attach            the layers of a model, put into a bank and taken out again
    bank              `AdapterBank`: what users have of it

A module imports those above it in this list.
"""

from .bank import AdapterBank
from .training import AdapterAdamW, Trainable

__all__ = ["AdapterAdamW", "AdapterBank", "Trainable"]
