"""PEFT's own test-suite with the methods of this package as rows of it.

    python tests/support/peft_suite.py [folder] [pytest arguments]

Fetches PEFT's released source distribution into the folder, unless it is there, adds the methods
to the tables of its tests, builds the models that these take from a hub out of configurations, and
runs their rows, offline. `make test-peft` does this with what it needs installed.

- test_custom_models.py: rows of custom models, of several active adapters, of mixed batches;
- the suites of decoders, encoder-decoders, encoders and sequence classifiers;
- test_quantization.py: every method over every quantisation that runs on this machine's CPU, and of
  test_gpu_examples.py the dtypes of adapters over bitsandbytes' layers, which need no GPU either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VERSION = "0.21.2"

# method as PEFT's tests are to call it → (configuration, name, ranks). The custom models of PEFT
# are as small as 10 → 20 → 2 and 5 → 1: ranks are taken down to that, but n must divide it.
METHODS = {
    "LoRA-XS": ("LoraXSConfig", "lora_xs", {"r": 4}),
    "LoRA-Mini": ("LoraMiniConfig", "lora_mini", {"r": 2, "a": 4}),
    "LoRA-FA": ("LoraFAConfig", "lora_fa", {"r": 4}),
    "Tied-LoRA": ("TiedLoraConfig", "tied_lora", {"r": 4}),
    "MELoRA": ("MeloraConfig", "melora", {"r": 2, "n": 2}),
    "NOLA": ("NolaConfig", "nola", {"r": 4, "m": 6}),
}
# What is given beside the defaults: a tied pair has the gradients of all layers, and diverges.
DEFAULTS: dict[str, dict[str, int]] = {"MELoRA": {"n": 2}, "Tied-LoRA": {"lora_alpha": 1}}
CONV1D = {"MELoRA": {"n": 1}}
CONFIGS = ", ".join(config for config, *_ in METHODS.values())
IMPORT = f"from fused_lowrank.integrations.peft import {CONFIGS}\n"
CUSTOM = (
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP defaults", "MLP", {"target_modules": ["lin0", "lin1"], "defaults": True}),
    ("Vanilla MLP dropout", "MLP", {"target_modules": ["lin0"], "lora_dropout": 0.1}),
    (
        "Vanilla MLP rsLoRA",
        "MLP",
        {"target_modules": ["lin0"], "lora_alpha": 8, "use_rslora": True},
    ),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
)
PAIRS = (
    ("Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
)

# The suites of transformers' models: file, its table of models, task, the models.
TRANSFORMERS = (
    (
        "test_decoder_models.py",
        "PEFT_DECODER_MODELS_TO_TEST",
        "CAUSAL_LM",
        ("llama", "qwen2", "gpt2"),
    ),
    (
        "test_encoder_decoder_models.py",
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
        "SEQ_2_SEQ_LM",
        ("t5",),
    ),
    (
        "test_feature_extraction_models.py",
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
        "FEATURE_EXTRACTION",
        ("bert", "roberta"),
    ),
    ("test_seq_classifier.py", "PEFT_SEQ_CLS_MODELS_TO_TEST", "SEQ_CLS", ("bert-cls", "llama-cls")),
)

# What testing_common.py holds for LoRA alone: mixed batches, those with beams, Conv1D.
GATES = (
    "(LoraConfig, RoadConfig)",
    "(LoraConfig,)",
    "(IA3Config, LoHaConfig, LoKrConfig, LoraConfig)",
)

# The suites of quantised models: file, what is run of it.
QUANTISED = (
    ("test_quantization.py", ""),
    ("test_gpu_examples.py", "::TestDtypeAutocastBnb"),
)


def rows(of_pairs: bool) -> str:
    """The rows of the custom models, or of two active adapters, as source text."""
    lines = []
    for method, (config, called, ranks) in METHODS.items():
        if of_pairs:
            for name, *settings in PAIRS:
                first, second = ({**ranks, **own, "init_weights": False} for own in settings)
                lines.append(f"({f'{method} {name}'!r}, {called!r}, {config}, {first}, {second}),")
            continue
        for name, model, settings in CUSTOM:
            own = {**ranks, **settings}
            if own.pop("defaults", None):
                own = {name: value for name, value in own.items() if name not in ranks}
                own |= DEFAULTS.get(method, {})
            own |= CONV1D.get(method, {}) if model == "EmbConv1D" else {}
            lines.append(f"({f'{name} {method}'!r}, {model!r}, {config}, {own}),")
    return "\n".join(lines)


def mixed_rows() -> str:
    """The rows of mixed batches: two ranks of each method."""
    lines = []
    for method, (config, _, ranks) in METHODS.items():
        first = {"target_modules": ["lin0"], "init_weights": False, **ranks}
        second = {**first, "r": 16}
        lines.append(f"({f'{method} mixed adapter'!r}, {config}(**{first}), {config}(**{second})),")
    return "\n".join(lines)


def put(text: str, anchor: str, added: str) -> str:
    """The text with something added behind an anchor, which must be there once."""
    if text.count(anchor) != 1:
        raise SystemExit(f"PEFT's tests are not those of {VERSION}: {anchor!r} is not there once")
    return text.replace(anchor, anchor + added)


def open_gate(text: str, gate: str, opened: str) -> str:
    """The text with a test's condition on the method widened, wherever it stands."""
    if gate not in text:
        raise SystemExit(f"PEFT's tests are not those of {VERSION}: {gate!r} is not there")
    return text.replace(gate, opened)


def fetch(folder: Path) -> Path:
    """The tests of PEFT's source distribution, unpacked anew."""
    archive = folder / f"peft-{VERSION}.tar.gz"
    if not archive.exists():
        call = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
        call += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", f"peft=={VERSION}"]
        subprocess.run(call, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tests = folder / f"peft-{VERSION}" / "tests"
    (tests / "__init__.py").touch()  # they import each other relatively
    return tests


def patch(tests: Path, models: dict[str, str]) -> None:
    """Add the rows, take the models from the folders, open the tests of mixed batches."""
    custom = tests / "test_custom_models.py"
    text = put(custom.read_text(), "\nfrom peft.tuners import lora\n", IMPORT)
    text = put(text, "\nTEST_CASES = [\n", rows(False))
    text = put(text, "\nMULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [\n", rows(True))
    text = put(text, "\nMIXED_ADAPTER_TEST_CASES = [\n", mixed_rows())
    # These two load an adapter into a model with other random weights, which is refused here.
    fresh = "        model = DeepMLP(size=256)"
    head, tests_of_loading = text.split("    def test_loading_model_requires_grad_set_correctly(")
    tests_of_loading = tests_of_loading.replace(fresh, f"        torch.manual_seed(0)\n{fresh}")
    text = head + "    def test_loading_model_requires_grad_set_correctly(" + tests_of_loading
    # All of an adapter is to be trained but AdaLoRA's `ranknum`, which is frozen, as ours are.
    frozen = 'if skip_ranknum and "ranknum" in name:'
    text = open_gate(text, frozen, 'if (skip_ranknum and "ranknum" in name) or ".basis_" in name:')
    custom.write_text(text)

    common = tests / "testing_common.py"
    text = put(common.read_text(), "\nfrom peft.tuners.lora import LoraLayer\n", IMPORT)
    for known in GATES:
        text = open_gate(text, f"not in {known}:", f"not in (*{known}, {CONFIGS}):")
    common.write_text(text)

    for file, table, task, names in TRANSFORMERS:
        path = tests / file
        text = path.read_text()
        configs = [
            f"({config}, { ({'task_type': task, 'target_modules': None, **ranks}) }),"
            for config, _, ranks in METHODS.values()
        ]
        for name, entries in (
            (table, [repr(models[n]) + "," for n in names]),
            ("ALL_CONFIGS", configs),
        ):
            new = f"{name} = [\n" + "\n".join(entries) + "\n]\n"
            text, count = re.subn(
                rf"^{name} = \[\n.*?^\]\n", lambda _, new=new: new, text, flags=re.M | re.S
            )
            if count != 1:
                raise SystemExit(f"PEFT's tests are not those of {VERSION}: no {name} in {file}")
        if task == "CAUSAL_LM":
            gate = 'if config_cls != LoraConfig:\n            pytest.skip("Mixed'
            opened = gate.replace("!= LoraConfig", f"not in (LoraConfig, {CONFIGS})")
            text = open_gate(text, gate, opened)
        path.write_text(put(text, "\nfrom .testing_common import PeftCommonTester\n", IMPORT))


def patch_quantised(tests: Path, models: dict[str, str]) -> None:
    """Add the methods to the suites of quantised models, with models of this machine's."""
    path = tests / "test_quantization.py"
    text = put(path.read_text(), "\nfrom peft.utils import infer_device\n", IMPORT)
    configs = [
        f"({config}, { ({**ranks, 'target_modules': ['q_proj', 'v_proj']}) }),"
        for config, _, ranks in METHODS.values()
    ]
    text = put(text, "\nTEST_CASES = [\n", "\n".join(configs) + "\n")
    path.write_text(open_gate(text, '"peft-internal-testing/opt-125m"', repr(models["opt"])))

    path = tests / "test_gpu_examples.py"
    anchor = "\nfrom tests.testing_utils import hub_online_once\n"
    text = put(path.read_text(), anchor, IMPORT)
    text = open_gate(text, 'if device == "cpu":', "if False:")
    text = open_gate(
        text, "@require_non_cpu\n@require_bitsandbytes\nclass TestDtype", "class TestDtype"
    )
    names = [config for config, *_ in METHODS.values()]
    text = open_gate(text, '["lora", "vera", "lora-target-param"]', repr(names))
    ranks = ", ".join(f"{config!r}: {ranks}" for config, _, ranks in METHODS.values())
    text = open_gate(
        text,
        'if peft_type == "lora":\n            peft_config = LoraConfig()\n',
        f"if True:\n            peft_config = globals()[peft_type](**{{ {ranks} }}[peft_type])\n",
    )
    tiny = '"trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"'
    path.write_text(open_gate(text, tiny, repr(models["qwen2"])))


def build_models(folder: Path) -> dict[str, str]:
    """Tiny models with random weights, saved: name → folder."""
    import torch
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {**sizes, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 1000}
    encoder = {**sizes, "intermediate_size": 64, "vocab_size": 1000}
    configs = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**decoder)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**decoder)),
        "gpt2": (
            t.GPT2LMHeadModel,
            t.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=1000, bos_token_id=1, eos_token_id=2
            ),
        ),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(
                vocab_size=1000,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            ),
        ),
        "bert": (t.BertModel, t.BertConfig(**encoder)),
        "bert-cls": (t.BertForSequenceClassification, t.BertConfig(**encoder)),
        "llama-cls": (t.LlamaForSequenceClassification, t.LlamaConfig(**decoder)),
        "roberta": (t.RobertaModel, t.RobertaConfig(**encoder)),
        "opt": (  # as many layers as that of PEFT's tests, which count them
            t.OPTForCausalLM,
            t.OPTConfig(
                hidden_size=128,
                word_embed_proj_dim=128,
                ffn_dim=128,
                num_hidden_layers=12,
                num_attention_heads=4,
                vocab_size=200,
            ),
        ),
    }
    found = {}
    for name, (cls, config) in configs.items():
        path = folder / "models" / f"tiny-{cls.__name__}"
        if not path.exists():
            torch.manual_seed(0)
            model = cls(config)
            if name == "opt":
                as_trained(model)
            model.save_pretrained(path)
        found[name] = str(path)
    return found


def as_trained(model: Any) -> None:
    """Give matrices singular values that fall, as trained ones have them, and larger embeddings.

    The values of random ones lie so close that rounding turns their vectors, from which LoRA-XS
    starts; and beside random embeddings what four bits lose of twelve layers is a tenth of the sum.
    """
    import torch

    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            left, sigma, right = torch.linalg.svd(weight.detach(), full_matrices=False)
            falling = sigma.norm() * 0.6 ** torch.arange(len(sigma))
            weight.data = left @ torch.diag(falling) @ right
        elif "embed" in name:
            weight.data *= 5.0


def main() -> None:
    """Fetch, patch, run."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = fetch(folder)
    models = build_models(folder)
    patch(tests, models)
    patch_quantised(tests, models)
    configs = [config for config, *_ in METHODS.values()]
    chosen = " or ".join([*METHODS, *configs, *(name.removesuffix("Config") for name in configs)])
    files = ["test_custom_models.py", *(file for file, *_ in TRANSFORMERS)]
    files += [file + chosen_of for file, chosen_of in QUANTISED]
    call = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-k", chosen]
    # Its suite makes errors of warnings, and a later transformers warns of what PEFT uses of it.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        call += ["-W", f"ignore:`{name}` is deprecated:FutureWarning"]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    paths = [str(tests / file) for file in files]
    run = subprocess.run(
        [*call, *sys.argv[2:], *paths], cwd=tests.parent, env={**os.environ, **offline}
    )
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
