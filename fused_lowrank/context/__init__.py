"""The model that a layer is in, and the call that is running: what layers have to know of both.

    flags             attributes by which a model may choose what it runs
    following_rules   where an operation's result has the sequences that its inputs have
    following         a call's operations, followed by these rules
    calls             the model's call, and what is remembered of it
    whose_rows        which rows of a layer's input are whose
    recomputed        what a checkpoint computes again
    declared          `declare_rows`: the same, as the caller says it
    disabling         which layers are disabled in the calling context
    readers           layers whose weights a model's code reads
    called            adapted layers that are read, or never called: named
    learns            what could never learn, or is saved as NaN: named
    offload_hook      accelerate's hook for some tensors of a module
    elsewhere         weights that are offloaded or sharded between calls

A module imports those above it in this list.
"""
