"""The kinds of checkpoints of a model of blocks."""

from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank

CHECKPOINTS = {
    "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "keyword": lambda block, x: checkpoint(block, hidden=x, use_reentrant=False),
    "layer": lambda block, x: checkpoint(
        lambda h: checkpoint(block.first, h, use_reentrant=False), x, use_reentrant=False
    ),
    "function": lambda block, x: checkpoint(
        lambda h: block(h * 2.0),
        x,
        use_reentrant=False,
        context_fn=AdapterBank.checkpoint_context,
    ),
}
