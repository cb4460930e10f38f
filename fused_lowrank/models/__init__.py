"""Whole models: adapters put into their layers and taken out again.

    unchanged         a model as it was, if a call fails half way
    saving            `save_pretrained` of an adapted model, noticed
    patterns          what differs from layer to layer: ranks, alphas, which layers
    targets           the layers of a model that patterns name; "all-linear"
    refusals          models that are refused as a whole
    whole_modules     modules trained whole, known by their places
    ties              weights that several modules share
    originals         the weights that a model's were quantised from
    calibration       what the inputs of layers are like, over a user's batches
    adapt             `adapt`, `unload`, `merge`, `disable_adapters`
    budget            AdaLoRA's ranks, given to the layers that use them
    groups            parameters in groups for an optimiser: LoRA+
    restarts          ReLoRA's restart: adapters merged for good, and begun anew

A module imports those above it in this list.
"""
