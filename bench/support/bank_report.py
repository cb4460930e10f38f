"""Mixed batches in the report: the bank beside gathers in torch and PEFT's loop."""

from __future__ import annotations

from bench.support.tables import Device, about, by_case, failures, grid, number, spread_line

OURS = "bank"
SHORT = ("bank", "bank:layer", "graph", "gather-cores", "gather-lora", "peft-loop")
HEADLINE = 8  # cases in the README's table
WHAT = (
    "The forward of one layer without gradients, r = 16, cold cache, each row of the batch with an "
    "adapter of its own: m rows, d distinct adapters among them, of so many resident. `bank` is a "
    "whole call with names, `bank:handles` the same with handles; `bank:layer`, and each plan by "
    "its name, the layer alone, in a bank that was entered before, and `bank:invariant` that under "
    "`use_batch_invariance`; `graph` a replayed CUDA graph. "
    "`gather-cores` is the same equation in torch, `gather-lora` plain LoRA with A and B gathered "
    "for each row, `peft-loop` PEFT's layer called with `adapter_names`."
)


def relative(device: Device, case: str, name: str) -> float | None:
    """The time of a provider over the bare layer's."""
    return device.relative(case, name, "forward")


def excess(device: Device, case: str, name: str) -> str:
    """The excess of a provider over the bare layer, as a multiple of that of `bank`."""
    own, other = relative(device, case, OURS), relative(device, case, name)
    return number((other - 1) / (own - 1), 1) if own and other and own > 1 else "–"


def residents_text(device: Device) -> str:
    """The same batch with more and more adapters resident."""
    groups: dict[str, list[str]] = {}
    for case, line in device.cases.items():
        groups.setdefault(line["group"], []).append(case)
    body = []
    for group, several in groups.items():
        if len(several) > 1:
            for case in sorted(several, key=lambda name: device.cases[name]["resident"]):
                row = device.row(case, OURS)
                quartiles = row["relative"]["forward"] if row and "relative" in row else []
                cells = [number(value, 3) for value in quartiles] or ["–"] * 3
                body.append([group, f"{device.cases[case]['resident']:,}", *cells])
    head = ["case", "resident", "lower quartile", "median", "upper quartile"]
    text = f"#### `{OURS}` over the number of adapters resident, × bare layer\n\n"
    return text + grid(head, body) if body else ""


def full_text(device: Device) -> str:
    """A device's section of RESULTS.md."""
    others = [name for name in device.providers if name != "bare"]
    peers = [name for name in others if name.startswith(("gather", "peft"))]

    def ms(case: str, name: str) -> str:
        row = device.row(case, name)
        return number(row["forward"][1] if row else None, 3)

    def error(case: str, name: str) -> str:
        row = device.row(case, name)
        return number(row["error"]["ratio"] if row else None)

    def ratio(case: str, name: str) -> str:
        return number(relative(device, case, name))

    parts = [
        f"## Many adapters, {device.key['device']}\n\n{WHAT}\n\n{about(device)}\n"
        f"{spread_line(device, 'forward')}",
        "#### Time, as a multiple of the bare layer's\n",
        by_case(device, others, ratio),
        "#### Milliseconds (median)\n",
        by_case(device, device.providers, ms),
        f"#### What a peer adds to the bare layer, as a multiple of what `{OURS}` adds\n",
        by_case(device, peers, lambda case, name: excess(device, case, name)),
        residents_text(device),
        "#### Error against fp64, as a multiple of the same-dtype reference's\n",
        by_case(device, device.providers, error),
        failures(device),
    ]
    return "\n".join(part for part in parts if part)


def short_text(device: Device) -> str:
    """A device's part of the README."""
    names = [name for name in SHORT if name in device.providers]
    body = [
        [case, *(number(relative(device, case, name)) for name in names)]
        for case in list(device.cases)[:HEADLINE]
    ]
    head = ["m rows, each its own adapter: forward, × bare layer", *names]
    return f"\n{about(device)}\n\n{grid(head, body)}{spread_line(device, 'forward')}"
