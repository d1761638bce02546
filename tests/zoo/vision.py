"""Networks that look at images."""

import torch
import torch.nn.functional as F
from torch import Tensor

import bootgrad

from .architecture import CLASSES, B, Setting, case, classified, integers, model_of, normal, randomized
from .convolutional import Mixer, UNet, densenet, resnext, vgg, video


def images(size: int = 32) -> Tensor:
    return normal(B, 3, size, size)


def _of(kind: str, size: int = 32, attention: str | None = None, **options) -> Setting:
    """A classifier of transformers."""
    return classified(model_of(kind, "ForImageClassification", attention, num_labels=CLASSES, **options), images(size))


def _add(name: str, kind: str, size: int = 32, attentions: tuple[str, ...] = (), **options) -> None:
    if not attentions:
        case(name)(lambda: _of(kind, size, **options))
    for attention in attentions:
        case(f"{name}, {attention} attention")(lambda a=attention: _of(kind, size, a, **options))


def _add_batch_normed(name: str, build, quick: bool = False) -> None:
    """Two cases: batch norm by running statistics, and replaced by group norm."""
    case(f"{name}, batch norm in eval mode")(build)

    @case(f"{name}, group norm in its place", quick=quick)
    def replaced():
        setting = build()
        bootgrad.replace_batchnorm(setting.model).train()
        return setting


_BATCH_NORMED = {
    "ResNet": dict(kind="ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "ResNet of bottlenecks": dict(kind="ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]),
    "RegNet": dict(kind="RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4),
    "MobileNetV2": dict(
        kind="MobileNetV2", depth_multiplier=0.1, min_depth=8, depth_divisible_by=8, classifier_dropout_prob=0.0
    ),
    "EfficientNet": dict(
        kind="EfficientNet", width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, dropout_rate=0.0,
        drop_connect_rate=0.0,
    ),
    "SwiftFormer": dict(kind="SwiftFormer", depths=[2, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2),
    "CvT": dict(
        kind="Cvt", embed_dim=[8, 8, 16], num_heads=[1, 2, 2], depth=[1, 2, 3], mlp_ratio=[2.0] * 3,
        drop_path_rate=[0.0] * 3,
    ),
}  # fmt: skip
for _name, _options in _BATCH_NORMED.items():
    _add_batch_normed(_name, lambda o=_options: _of(**o), quick=_name == "ResNet")
_add_batch_normed("ResNeXt", lambda: classified(randomized(resnext()), images()))
_add_batch_normed("DenseNet", lambda: classified(randomized(densenet()), images()))

_VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
)
_DINO = {name: value for name, value in _VIT.items() if name != "intermediate_size"} | dict(mlp_ratio=2)
_SWIN = dict(
    image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
    drop_path_rate=0.0,
)  # fmt: skip
_PYRAMID = dict(depths=[1] * 4, hidden_sizes=[4, 8, 8, 16], num_attention_heads=[1, 2, 2, 2], mlp_ratios=[2] * 4)
_BOTH = ("eager", "sdpa")

_add("ConvNeXt", "ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)
_add("ConvNeXt V2", "ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)
_add("BiT", "Bit", hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_groups=2)
_add("FocalNet", "FocalNet", image_size=32, embed_dim=8, depths=[1, 1], drop_path_rate=0.0, use_layerscale=True)
_add("PoolFormer", "PoolFormer", depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], mlp_ratio=2.0)
_add("ViT", "ViT", attentions=_BOTH, **_VIT)
_add("DeiT", "DeiT", **_VIT)
_add("DINOv2", "Dinov2", **_DINO)
_add("DINOv2, gated, on smaller images", "Dinov2", size=24, use_swiglu_ffn=True, **_DINO)
_add("DINOv2 with registers", "Dinov2WithRegisters", **_DINO)
_add("SigLIP", "Siglip", vision_config=_VIT)
_add("Swin", "Swin", attentions=_BOTH, **_SWIN)
_add("Swin V2", "Swinv2", **_SWIN)
_add("SegFormer", "Segformer", drop_path_rate=0.0, classifier_dropout_prob=0.0, **_PYRAMID)
_add("PVT v2", "PvtV2", image_size=32, **_PYRAMID)
_add(
    "Hiera", "Hiera", image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], mlp_ratio=2.0, num_query_pool=1,
    masked_unit_size=[4, 4], masked_unit_attention=[True, False],
)  # fmt: skip


@case("MobileViT")
def _mobilevit():
    sizes = dict(hidden_sizes=[8, 12, 16], neck_hidden_sizes=[4, 8, 8, 12, 12, 16, 16], num_attention_heads=2)
    dropout = dict(hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)
    setting = _of("MobileViT", image_size=32, **sizes, **dropout)
    bootgrad.replace_batchnorm(setting.model)
    return setting


def _levit() -> Setting:
    return _of(
        "Levit", size=64, image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2] * 3, depths=[1] * 3,
        key_dim=[4] * 3, patch_size=16,
    )  # fmt: skip


@case("LeViT")
def _trained_levit():
    setting = _levit()
    bootgrad.replace_batchnorm(setting.model).train()
    return setting


@case("LeViT in eval mode, which keeps biases from pass to pass", refusal="outside of the recorded operations")
def _kept_levit():
    setting = _levit()
    setting.losses(*setting.inputs)
    return setting


def _beit() -> Setting:
    return _of("Beit", use_relative_position_bias=True, use_mask_token=True, drop_path_rate=0.0, **_VIT)


@case("BEiT, the index of positions made a buffer")
def _beit_with_buffers():
    setting = _beit()
    for module in setting.model.modules():
        if hasattr(module, "generate_relative_position_index"):
            index = module.generate_relative_position_index(module.window_size)
            module.register_buffer("index", index, persistent=False)
    return setting


@case("BEiT, the index of positions kept from pass to pass", refusal="puts out 289 rows .* a buffer of the model")
def _beit_with_a_cache():
    setting = _beit()
    setting.losses(*setting.inputs)
    return setting


@case("ViT-MAE")
def _mae():
    decoder = dict(
        decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_intermediate_size=32
    )
    model = model_of("ViTMAE", "ForPreTraining", mask_ratio=0.5, **decoder, **_VIT)

    def losses(x, noise):
        out = model(x, noise=noise)
        errors = (out.logits - model.patchify(x)).square().mean(-1)
        return (errors * out.mask).sum(1) / out.mask.sum(1)

    return Setting(model, losses, (images(), torch.rand(B, 16, generator=torch.Generator().manual_seed(4))))


@case("VGG, with dropout")
def _vgg():
    model = randomized(vgg())
    return classified(model.train(), images())


@case("U-Net")
def _unet():
    model = randomized(UNet())

    def losses(x, labels):
        return F.cross_entropy(model(x), labels, reduction="none").mean((1, 2))

    return Setting(model, losses, (images(16), integers(CLASSES, B, 16, 16)))


case("MLP-Mixer", quick=True)(lambda: classified(randomized(Mixer()), images()))
case("R(2+1)D")(lambda: classified(randomized(video()), normal(B, 3, 4, 8, 8)))
