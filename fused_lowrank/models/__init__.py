"""Whole models: adapters put into their layers and taken out again.

    unchanged         a model as it was, if a call fails half way
    saving            `save_pretrained` of an adapted model, noticed
    targets           the layers of a model that patterns name; "all-linear"
    refusals          models that are refused as a whole
    whole_modules     modules trained whole, known by their places
    ties              weights that several modules share
    adapt             `adapt`, `unload`, `merge`, `disable_adapters`
    budget            AdaLoRA's ranks, given to the layers that use them

A module imports those above it in this list.
"""
