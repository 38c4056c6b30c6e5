"""Small random models of the families that people use, with the batches that their libraries take."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from nets import classes, normal
from torch import Tensor, nn

VOCABULARY = 13
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16}
DECODER = {**COMMON, **SIZES, "intermediate_size": 8, "num_key_value_heads": 1, "head_dim": 4}
ENCODER = {**COMMON, **SIZES, "intermediate_size": 8}
RELATIVE = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
VISION = {
    **{"image_size": 8, "patch_size": 4, "num_channels": 1},
    **{"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1},
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", DECODER),
    "Mistral": ("MistralForCausalLM", DECODER),
    "Mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2ForCausalLM", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", DECODER),
    "Gemma": ("GemmaForCausalLM", DECODER),
    "Gemma 2": ("Gemma2ForCausalLM", {**DECODER, "num_hidden_layers": 2}),  # of two kinds
    "Gemma 3": ("Gemma3ForCausalLM", {**DECODER, "layer_types": ["sliding_attention"], "sliding_window": 4}),
    "Phi": ("PhiForCausalLM", DECODER),
    "Falcon": ("FalconForCausalLM", {**COMMON, **SIZES}),
    "Bloom": ("BloomForCausalLM", {**COMMON, "hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "MPT": ("MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}),
    "GPT-2": ("GPT2LMHeadModel", {**COMMON, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", ENCODER),
    "OPT": ("OPTForCausalLM", {**COMMON, **SIZES, "ffn_dim": 8, "word_embed_proj_dim": 8}),
    "Mamba": ("MambaForCausalLM", {**COMMON, "hidden_size": 8, "state_size": 3, "num_hidden_layers": 1}),
    "T5": (
        "T5ForConditionalGeneration",
        {**COMMON, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "BART": (
        "BartForConditionalGeneration",
        {
            **{**COMMON, "d_model": 8, "max_position_embeddings": 16, "decoder_start_token_id": 2},
            **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in [("layers", 1), ("ffn_dim", 8)]},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None},
        },
    ),
    "BERT": ("BertForMaskedLM", ENCODER),
    "RoBERTa": ("RobertaForMaskedLM", ENCODER),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        {**COMMON, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16},
    ),
    "ALBERT": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 4}),
    "ELECTRA": ("ElectraForMaskedLM", {**ENCODER, "embedding_size": 4}),
    "DeBERTa": ("DebertaForMaskedLM", RELATIVE),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", {**RELATIVE, "position_buckets": 4}),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", {**VISION, "num_labels": 3}),
    "Swin": (
        "SwinForImageClassification",
        {
            **{"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 4, "num_labels": 3},
            **{"depths": [2], "num_heads": [2], "window_size": 2},
        },
    ),
    "CLIP": (
        "CLIPModel",
        {
            "text_config": {**ENCODER, "projection_dim": 8},
            "vision_config": {**VISION, "projection_dim": 8},
            "projection_dim": 8,
        },
    ),
}
SOUNDS = {
    "hidden_size": 8,
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 3, "vocab_size": 5},
    **{"conv_dim": (4, 4), "conv_stride": (3, 2), "conv_kernel": (3, 2), "classifier_proj_size": 4},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
}
CAUSAL = ("ForCausalLM", "LMHeadModel")


class Case(NamedTuple):
    """A model, a batch of it, and how the two give a loss."""

    variant: str
    build: Callable[[], nn.Module]
    batch: Any
    criterion: Callable[[Any, Any], Tensor] = lambda outputs, batch: outputs.loss
    params: str = "*"
    twin: Callable[[], nn.Module] | None = None  # the same function, where the model does not run in float64


class Family(NamedTuple):
    name: str
    package: str
    cases: Callable[[], Iterator[Case]]


def imported(package: str) -> Any:
    with warnings.catch_warnings():
        # Of these packages themselves: they call what torch has deprecated when they are imported.
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


# Transformers.


def padded(kind: str, length: int, by: int) -> Tensor | None:
    """An attention mask of two samples, the first padded by so many."""
    if kind == "without mask":
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, by) if kind == "padded left" else slice(length - by, length)] = 0
    return mask


def masked(batch: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
    return batch if mask is None else {**batch, "attention_mask": mask}


def of_text(kind: str, is_causal: bool) -> dict[str, Any]:
    ids, mask = 3 + classes(12, VOCABULARY - 3).reshape(2, 6), padded(kind, 6, 2)
    if mask is None:
        return {"input_ids": ids, "labels": ids}
    count = mask.bool()
    if is_causal:  # What follows a pad is not predicted: a pad that sees pads alone has no attention.
        count = count & count.roll(1, dims=1) if kind == "padded left" else count
    return masked({"input_ids": ids * mask, "labels": ids.masked_fill(~count, -100)}, mask)


def of_images(name: str, kind: str) -> dict[str, Any]:
    images = {"pixel_values": normal(2, 1, 8, 8)}
    if name != "CLIP":
        return {**images, "labels": torch.tensor([0, 2])}
    ids = of_text(kind, is_causal=False)
    del ids["labels"]
    ids["input_ids"][:, -3] = 2  # the end of a text, where its features are
    return {**images, **ids, "return_loss": True}


def of_sounds(is_ctc: bool, kind: str) -> dict[str, Any]:
    labels = torch.tensor([[1, 2], [3, 1]]) if is_ctc else torch.tensor([0, 2])
    return masked({"input_values": normal(2, 60), "labels": labels}, padded(kind, 60, 18))


def transformer(kind: str, attention: str, config: dict[str, Any], experts: str = "eager") -> nn.Module:
    made = getattr(imported("transformers"), kind)
    options = {"experts_implementation": experts} if kind.startswith("Mixtral") else {}
    model: nn.Module = made._from_config(made.config_class(**config), attn_implementation=attention, **options)
    return model


def transformers_cases(
    kind: str, config: dict[str, Any], batch: Callable[[str], dict[str, Any]], masks: tuple[str, ...]
) -> Iterator[Case]:
    made = getattr(imported("transformers"), kind)
    for attention in ("sdpa", "eager") if made._supports_sdpa else ("eager",):
        for mask in masks[:2] if attention == "eager" and made._supports_sdpa else masks:
            build = lambda attention=attention: transformer(kind, attention, config)  # noqa: E731
            yield Case(f"{attention}, {mask}" if mask else attention, build, batch(mask))


def of_groups(kind: str, config: dict[str, Any]) -> Case:
    """The default of experts, which torch has not in float64."""
    build = lambda: transformer(kind, "sdpa", config, "grouped_mm")  # noqa: E731
    return Case("", build, of_text("without mask", True), twin=lambda: transformer(kind, "sdpa", config))


def of_transformers() -> Iterator[Family]:
    masks = ("without mask", "padded left", "padded right")

    def family(name: str, *rest: Any) -> Family:
        return Family(name, "transformers", lambda: transformers_cases(*rest))

    for name, (kind, config) in TEXTS.items():
        is_causal = kind.endswith(CAUSAL)
        yield family(name, kind, config, lambda mask, is_causal=is_causal: of_text(mask, is_causal), masks)
        if name == "Mixtral":
            yield Family(
                "Mixtral, experts by `grouped_mm`",
                "transformers",
                lambda kind=kind, config=config: iter([of_groups(kind, config)]),
            )
    for name, (kind, config) in IMAGES.items():
        of = masks if name == "CLIP" else ("",)
        yield family(name, kind, config, lambda mask, name=name: of_images(name, mask), of)
    for what, end in (("", "ForSequenceClassification"), (" with CTC", "ForCTC")):
        is_ctc = bool(what)
        of_sound = lambda mask, is_ctc=is_ctc: of_sounds(is_ctc, mask)  # noqa: E731
        yield family(f"Wav2Vec2{what}", f"Wav2Vec2{end}", SOUNDS, of_sound, masks)


# timm.

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (32, {}),
    "test_convnext": (32, {}),
    "test_efficientnet": (32, {}),
    "test_vit": (160, {}),
    "test_nfnet": (32, {}),
    "swin_tiny_patch4_window7_224": (
        16,
        {"img_size": 16, "window_size": 2, "patch_size": 2, "embed_dim": 4, "depths": (2, 1), "num_heads": (2, 2)},
    ),
    "MlpMixer": (16, {"img_size": 16, "patch_size": 8, "num_blocks": 1, "embed_dim": 8}),
    "regnetx_002": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "densenet121": (32, {"growth_rate": 4, "block_config": (2, 2)}),
    "deit_tiny_distilled_patch16_224": (
        16,
        {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2},
    ),
    "cait_xxs24_224": (16, {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}),
}


def timm_cases(name: str, size: int, options: dict[str, Any]) -> Iterator[Case]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm's own initialisation of its weights
            create = imported("timm").create_model
            if name == "MlpMixer":  # whose names have all sizes in them
                create = lambda name, **options: getattr(imported("timm.models"), name)(**options)  # noqa: E731
            return create(name, in_chans=1, num_classes=3, **options)

    yield Case("", build, (normal(2, 1, size, size), classes(2, 3)), nn.CrossEntropyLoss())


def of_timm() -> Iterator[Family]:
    for name, (size, options) in TIMM.items():
        yield Family(name, "timm", lambda name=name, size=size, options=options: timm_cases(name, size, options))


# Diffusion, graphs, differential equations, adapters, equivariance.


def square(outputs: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(getattr(outputs, "sample", outputs), targets)


def unet() -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8)}
    of_norms = {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    return imported("diffusers").UNet2DModel(**sizes, **blocks, **of_norms)  # type: ignore[no-any-return]


def conditional_unet() -> nn.Module:
    return imported("diffusers").UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=6,
    )


def of_diffusers() -> Iterator[Family]:
    noisy, steps, noise = normal(2, 1, 8, 8), torch.tensor([3, 40]), normal(2, 1, 8, 8, seed=2)
    yield Family("UNet2DModel", "diffusers", lambda: iter([Case("", unet, ((noisy, steps), noise), square)]))
    given = (noisy, steps, normal(2, 5, 6, seed=3))
    yield Family(
        "UNet2DConditionModel", "diffusers", lambda: iter([Case("", conditional_unet, (given, noise), square)])
    )


class OnGraph(nn.Module):
    """Two convolutions of PyG."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        made = getattr(imported("torch_geometric.nn"), kind)
        self.first, self.second = made(4, 5, **options), made(5, 3, **options)

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.second(self.first(x, edge_index).tanh(), edge_index)


GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "GCNConv": ("GCNConv", {}),
    "GATConv": ("GATConv", {}),
    "GATv2Conv": ("GATv2Conv", {}),
    "SAGEConv": ("SAGEConv", {}),
    "GraphConv": ("GraphConv", {}),
    'GraphConv, `aggr="max"`': ("GraphConv", {"aggr": "max"}),
    'GraphConv, `aggr="mul"`': ("GraphConv", {"aggr": "mul"}),
    "TransformerConv": ("TransformerConv", {}),
}


def of_graphs() -> Iterator[Family]:
    edges = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 0, 2], [1, 0, 2, 1, 4, 3, 0, 5, 5]])
    batch = ((normal(6, 4), edges), classes(6, 3))

    def family(name: str, kind: str, options: dict[str, Any]) -> Family:
        case = Case("", lambda: OnGraph(kind, **options), batch, nn.CrossEntropyLoss())
        return Family(name, "torch_geometric", lambda: iter([case]))

    for name, (kind, options) in GRAPHS.items():
        yield family(name, kind, options)


class Flow(nn.Module):
    """A neural ordinary differential equation."""

    def __init__(self, solver: str, method: str) -> None:
        super().__init__()
        self.solver, self.method = solver, method
        self.rate, self.out = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        odeint = getattr(imported("torchdiffeq"), self.solver)
        rate = Rate(self.rate)
        options = {"rtol": 1e-11, "atol": 1e-11} if self.method == "dopri5" else {"options": {"step_size": 0.1}}
        return self.out(odeint(rate, x, x.new_tensor([0.0, 0.5]), method=self.method, **options)[-1])


class Rate(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Any:
        return self.net(x) * (1 + t)


def of_equations() -> Iterator[Family]:
    def family(solver: str, method: str) -> Family:
        case = Case("", lambda: Flow(solver, method), (normal(4, 3), classes(4, 3)), nn.CrossEntropyLoss())
        return Family(f"{solver}, {method}", "torchdiffeq", lambda: iter([case]))

    for solver in ("odeint", "odeint_adjoint"):
        for method in ("rk4", "dopri5"):
            yield family(solver, method)


def with_lora(name: str) -> nn.Module:
    peft, (kind, config) = imported("peft"), TEXTS[name]
    layers = {"Llama": ["q_proj", "v_proj"], "BERT": ["query", "value"]}[name]
    model = peft.get_peft_model(
        transformer(kind, "sdpa", config), peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers)
    )
    return model  # type: ignore[no-any-return]


def of_adapters() -> Iterator[Family]:
    def family(name: str) -> Family:
        batch = of_text("padded left", is_causal=name == "Llama")
        case = Case("", lambda: with_lora(name), batch, params="*lora_*")
        return Family(f"LoRA of {name}", "peft", lambda: iter([case]))

    for name in ("Llama", "BERT"):
        yield family(name)


class Equivariant(nn.Module):
    """A tensor product and a gate of e3nn."""

    def __init__(self) -> None:
        super().__init__()
        o3, gates = imported("e3nn.o3"), imported("e3nn.nn")
        gate = gates.Gate("2x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
        self.product = o3.FullyConnectedTensorProduct("0e + 1o", "0e + 1o", gate.irreps_in)
        self.gate, self.out = gate, o3.Linear(gate.irreps_out, "3x0e")

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(self.gate(self.product(x, y)))


def equivariant(mode: str) -> nn.Module:
    e3nn = imported("e3nn")
    default = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode=mode)
    try:
        return Equivariant()
    finally:
        e3nn.set_optimization_defaults(jit_mode=default)


def of_equivariance() -> Iterator[Family]:
    def family(mode: str) -> Family:
        batch = ((normal(4, 4), normal(4, 4, seed=2)), classes(4, 3))
        case = Case("", lambda: equivariant(mode), batch, nn.CrossEntropyLoss())
        return Family(f'tensor product and gate, `jit_mode="{mode}"`', "e3nn", lambda: iter([case]))

    for mode in ("script", "eager"):
        yield family(mode)


FAMILIES = [
    family
    for of_package in (of_transformers, of_timm, of_diffusers, of_graphs, of_equations, of_adapters, of_equivariance)
    for family in of_package()
]
