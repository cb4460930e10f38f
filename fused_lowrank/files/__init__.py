"""Adapters in files: written, read, converted, looked at.

    fingerprint       the weights that an adapter belongs to, known again
    peft_others       PEFT's own VeRA and AdaLoRA
    peft_own          those that the PEFT integration writes, of more than cores
    peft_folder       folders that PEFT writes
    contents          what lies in an adapter's file: config and tensors
    other_base        the base it was made for, and `on_other_base="warn"`
    adapter           `save_adapter`, `load_adapter`
    official          the checkpoints of LoRA-XS's authors
    lora_parts        the terms that are exported
    lora_export       adapters as PEFT's plain LoRA
    peft_export       adapters as PEFT's own VeRA and AdaLoRA
    inspection        a file or folder, described
    cli               the command line

A module imports those above it in this list, and those of `models`. Of files with many adapters
`bank.file` is in charge.
"""
