"""Sound, series, pictures with text; sequences, graphs, tables, fields; and what couples samples."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import bootgrad

from . import generative, relational
from .architecture import (
    CLASSES,
    B,
    Setting,
    case,
    classified,
    integers,
    model_of,
    normal,
    padding,
    randomized,
    regressed,
    token_losses,
)
from .language import ENDS, T, V, tokens


def captioned(attention: str, contrastive: bool) -> Setting:
    """CLIP: a picture and its text are to be alike, and in the contrastive loss unlike those of other samples."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=V, max_position_embeddings=T, **sizes, **ENDS)
    vision = dict(image_size=16, patch_size=8, **sizes)
    model = model_of("CLIP", "Model", attention, text_config=text, vision_config=vision, projection_dim=8)

    def losses(words, mask, pixels):
        out = model(input_ids=words, attention_mask=mask, pixel_values=pixels)
        if contrastive:
            return F.cross_entropy(out.logits_per_image, torch.arange(B), reduction="none")
        return model.logit_scale.exp() * (1 - F.cosine_similarity(out.text_embeds, out.image_embeds, dim=1))

    return Setting(model, losses, (tokens(), padding(T), normal(B, 3, 16, 16)))


def transcribed(attention: str) -> Setting:
    """Whisper: text from sound."""
    sizes = dict(
        vocab_size=V, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=8, max_target_positions=8,
    )  # fmt: skip
    ends = dict(decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **ENDS)
    model = model_of("Whisper", "ForConditionalGeneration", attention, dropout=0.0, **sizes, **ends)

    def losses(sound, target):
        logits = model(input_features=sound, decoder_input_ids=target[:, :-1], use_cache=False).logits
        return token_losses(logits, target[:, 1:], torch.ones_like(target[:, 1:]))

    return Setting(model, losses, (normal(B, 8, 16), tokens(6)))


for _a in ("eager", "sdpa"):
    case(f"CLIP, cosines, {_a} attention")(lambda a=_a: captioned(a, contrastive=False))
    case(f"Whisper, {_a} attention")(lambda a=_a: transcribed(a))
case("CLIP, contrasts in the batch", refusal="samples are coupled")(lambda: captioned("sdpa", contrastive=True))

_WAVES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8], conv_stride=[4, 2],
    conv_kernel=[8, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
    layerdrop=0.0, num_labels=CLASSES, classifier_proj_size=8, mask_time_prob=0.0,
)  # fmt: skip
for _name, _kind in (("wav2vec 2.0", "Wav2Vec2"), ("WavLM", "WavLM")):
    case(_name)(lambda kind=_kind: classified(model_of(kind, "ForSequenceClassification", **_WAVES), normal(B, 200)))


@case("Audio Spectrogram Transformer")
def _spectrograms():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=16)
    patches = dict(patch_size=4, frequency_stride=4, time_stride=4, num_mel_bins=8, num_labels=CLASSES)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return classified(model_of("AST", "ForAudioClassification", **sizes, **patches, **dropout), normal(B, 16, 8))


@case("EnCodec, its LSTM replaced")
def _codec():
    sizes = dict(num_filters=4, hidden_size=8, upsampling_ratios=[4, 2], codebook_size=8, codebook_dim=8)
    kernels = dict(kernel_size=3, last_kernel_size=3, residual_kernel_size=3, num_lstm_layers=1)
    model = model_of("Encodec", "Model", **sizes, **kernels)
    bootgrad.replace_rnn(model)
    sound = normal(B, 1, 64)
    return Setting(model, lambda x: (model.decoder(model.encoder(x)) - x).square().mean((1, 2)), (sound,))


@case("HiFi-GAN")
def _vocoder():
    rates = dict(upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4])
    blocks = dict(resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 2]])
    model = model_of("SpeechT5HifiGan", "", model_in_dim=4, upsample_initial_channel=8, **rates, **blocks)
    return regressed(model, normal(B, 24, seed=8), normal(B, 6, 4))


@case("PatchTST")
def _series():
    sizes = dict(num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4)
    layers = dict(num_hidden_layers=2, d_model=16, num_attention_heads=2, ffn_dim=32, norm_type="layernorm")
    dropout = dict(attention_dropout=0.0, positional_dropout=0.0, ff_dropout=0.0, head_dropout=0.0)
    model = model_of("PatchTST", "ForPrediction", loss="mse", **sizes, **layers, **dropout)

    def losses(past, future):
        return (model(past_values=past).prediction_outputs - future).square().mean((1, 2))

    return Setting(model, losses, (normal(B, 16, 2), normal(B, 4, 2, seed=8)))


@case("Decision Transformer")
def _decisions():
    sizes = dict(state_dim=4, act_dim=2, hidden_size=16, max_ep_len=16, n_layer=2, n_head=2, n_positions=16)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = model_of("DecisionTransformer", "Model", **sizes, **dropout)

    def losses(states, actions, returns, times):
        out = model(
            states=states, actions=actions, rewards=returns, returns_to_go=returns, timesteps=times,
            attention_mask=torch.ones_like(times),
        )  # fmt: skip
        return (out.action_preds - actions).square().mean((1, 2))

    times = torch.arange(5) + integers(4, B, 1)
    return Setting(model, losses, (normal(B, 5, 4), normal(B, 5, 2, seed=8), normal(B, 5, 1, seed=9), times))


@case("nn.TransformerEncoder")
def _encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    def losses(x, padded):
        return (model(x, src_key_padding_mask=padded).sin() * ~padded[..., None]).mean((1, 2))

    return Setting(model, losses, (normal(B, T, 16), padding(T) == 0))


case("nn.Transformer with queries of its own")(lambda: classified(randomized(relational.Queries()), normal(B, 6, 16)))


def tagged(own: bool) -> Setting:
    model = randomized(relational.Tagger(V, own=own))
    words = (integers(V - 1, B, T) + 1) * padding(T)

    def losses(words, tags, mask):
        return token_losses(model(words), tags, mask)

    return Setting(model, losses, (words, integers(CLASSES, B, T, seed=7), padding(T)))


case("LSTM tagger, written out", quick=True)(lambda: tagged(own=True))
case("LSTM tagger, two directions", refusal=r"Call bootgrad\.replace_rnn\(model\) first")(lambda: tagged(own=False))


@case("LSTM tagger, two directions, replaced")
def _replaced_tagger():
    setting = tagged(own=False)
    bootgrad.replace_rnn(setting.model)
    return setting


def _graphs():
    edges = normal(B, 6, 6, seed=3) > 0.3
    return normal(B, 6, 5), (edges | edges.mT | torch.eye(6).bool()).double()


case("Graph convolutions")(lambda: classified(randomized(relational.GraphConvolutions()), *_graphs()))
case("Graph attention")(lambda: classified(randomized(relational.GraphAttention()), *_graphs()))
case("PointNet")(lambda: classified(randomized(relational.PointNet()), normal(B, 3, 10)))
case("Hypernetwork")(lambda: classified(randomized(relational.HyperNetwork()), normal(B, 5)))


@case("LoRA, merged")
def _lora():
    inside = nn.Linear(5, 12).requires_grad_(False)
    layers = inside, relational.LoRA(), nn.GELU(), relational.LoRA(), nn.GELU(), nn.Linear(12, CLASSES)
    return classified(randomized(nn.Sequential(*layers)), normal(B, 5))


@case("DLRM")
def _clicks():
    model = randomized(relational.DLRM())
    inputs = normal(B, 5), integers(11, B, 3), integers(7, B, 2), integers(13, B, 1)

    def losses(clicks, *inputs):
        return F.binary_cross_entropy_with_logits(model(*inputs), clicks, reduction="none")

    return Setting(model, losses, (torch.tensor([1.0, 0.0, 1.0]).double(), *inputs))


@case("Diffusion U-Net")
def _denoiser():
    model = randomized(generative.Denoiser())

    def losses(x, noise, t, label):
        a = torch.cos(t / 1000 * math.pi / 2)[:, None, None, None]
        return (model(a * x + (1 - a * a).sqrt() * noise, t, label) - noise).square().mean((1, 2, 3))

    t = torch.tensor([10.0, 200.0, 700.0]).double()
    return Setting(model, losses, (normal(B, 3, 8, 8), normal(B, 3, 8, 8, seed=8), t, integers(CLASSES, B)))


@case("NeRF")
def _nerf():
    depths = torch.linspace(0.2, 1.5, 6, dtype=torch.float64) + 0.05 * normal(B, 1)
    rays = normal(B, 3), F.normalize(normal(B, 3, seed=8), dim=1), depths
    return regressed(randomized(generative.NeRF()), normal(B, 3, seed=9).sigmoid(), *rays)


@case("Fourier neural operator")
def _operator():
    layers = nn.Conv1d(2, 6, 1), generative.FourierLayer(), nn.GELU(), generative.FourierLayer(), nn.Conv1d(6, 1, 1)
    return regressed(randomized(nn.Sequential(*layers)), normal(B, 1, 12, seed=8), normal(B, 2, 12))


@case("SIREN")
def _siren():
    return regressed(randomized(generative.Siren()), normal(B, 10, 3, seed=8), normal(B, 10, 2))


@case("VAE")
def _vae():
    model = randomized(generative.VAE())
    return Setting(model, model.losses, (normal(B, 3, 8, 8),))


@case("RealNVP")
def _flow():
    model = randomized(generative.RealNVP())
    return Setting(model, model.losses, (normal(B, 8),))
