"""Networks that read text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import CLASSES, B, Setting, case, integers, model_of, padding, token_losses

T, V = 8, 29
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tokens(length: int = T, seed: int = 2):
    return integers(V - 3, B, length, seed=seed) + 3


def masked_words(model: nn.Module) -> Setting:
    """Words at some of the places, from the text around them."""
    mask = padding(T)
    hidden = mask * (torch.arange(T) % 3 == 1)

    def losses(words, mask, hidden):
        logits = model(input_ids=words.masked_fill(hidden.bool(), 2), attention_mask=mask).logits
        return token_losses(logits, words, hidden)

    return Setting(model, losses, (tokens(), mask, hidden))


def next_words(model: nn.Module) -> Setting:
    """Each word from those before it."""

    def losses(words, mask):
        logits = model(input_ids=words, attention_mask=mask, use_cache=False).logits
        return token_losses(logits[:, :-1], words[:, 1:], mask[:, 1:])

    return Setting(model, losses, (tokens(), padding(T)))


def unpadded(model: nn.Module) -> Setting:
    """Each word from those before it, all texts of one length."""

    def losses(words):
        logits = model(input_ids=words, use_cache=False).logits
        return token_losses(logits[:, :-1], words[:, 1:], torch.ones(B, T - 1))

    return Setting(model, losses, (tokens(),))


def sentences(model: nn.Module) -> Setting:
    """A class for each text."""

    def losses(words, mask, labels):
        return F.cross_entropy(model(input_ids=words, attention_mask=mask).logits, labels, reduction="none")

    return Setting(model, losses, (tokens(), padding(T), integers(CLASSES, B)))


def translations(model: nn.Module) -> Setting:
    """One text from another."""

    def losses(words, mask, target):
        out = model(input_ids=words, attention_mask=mask, decoder_input_ids=target[:, :-1], use_cache=False)
        return token_losses(out.logits, target[:, 1:], torch.ones_like(target[:, 1:]))

    return Setting(model, losses, (tokens(), padding(T), tokens(6, seed=7)))


BERT: dict[str, Any] = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=2, pad_token_id=0,
)  # fmt: skip
_FEWER = {name: value for name, value in BERT.items() if "attention" not in name}
_DEBERTA = BERT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"])

for _a in ("eager", "sdpa"):
    case(f"BERT, {_a} attention")(lambda a=_a: masked_words(model_of("Bert", "ForMaskedLM", a, **BERT)))


@case("DistilBERT")
def _distilbert():
    sizes = dict(vocab_size=V, max_position_embeddings=16, n_layers=2, n_heads=2, dim=16, hidden_dim=32)
    dropout = dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    return sentences(model_of("DistilBert", "ForSequenceClassification", num_labels=CLASSES, **sizes, **dropout))


@case("ALBERT, whose layers share their weights")
def _albert():
    return masked_words(model_of("Albert", "ForMaskedLM", embedding_size=8, **BERT))


@case("ELECTRA")
def _electra():
    return masked_words(model_of("Electra", "ForMaskedLM", embedding_size=8, **BERT))


@case("MPNet")
def _mpnet():
    return masked_words(model_of("MPNet", "ForMaskedLM", **BERT | ENDS))


@case("DeBERTa")
def _deberta():
    return masked_words(model_of("Deberta", "ForMaskedLM", **_DEBERTA))


@case("DeBERTa V2")
def _deberta_v2():
    options = dict(position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3)
    return masked_words(model_of("DebertaV2", "ForMaskedLM", **_DEBERTA, **options))


@case("ModernBERT")
def _modernbert():
    options = {name: value for name, value in BERT.items() if name != "type_vocab_size"}
    ends = ENDS | dict(cls_token_id=1, sep_token_id=2)
    return masked_words(model_of("ModernBert", "ForMaskedLM", local_attention=4, **options | ends))


@case("Funnel Transformer")
def _funnel():
    sizes = dict(vocab_size=V, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=32)
    dropout = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    return masked_words(model_of("Funnel", "ForMaskedLM", **sizes, **dropout))


@case("FNet")
def _fnet():
    model = model_of("FNet", "ForSequenceClassification", num_labels=CLASSES, **_FEWER)

    def losses(words, labels):
        return F.cross_entropy(model(input_ids=words).logits, labels, reduction="none")

    return Setting(model, losses, (tokens(), integers(CLASSES, B)))


@case("Perceiver")
def _perceiver():
    sizes = dict(vocab_size=V, max_position_embeddings=T, num_latents=4, d_latents=16, d_model=16, num_blocks=1)
    heads = dict(num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2)
    channels = dict(qk_channels=16, v_channels=16, attention_probs_dropout_prob=0.0)
    return masked_words(model_of("Perceiver", "ForMaskedLM", **sizes, **heads, **channels))


def _longformer() -> Setting:
    return masked_words(model_of("Longformer", "ForMaskedLM", attention_window=[4, 4], **BERT | dict(pad_token_id=1)))


case("Longformer, time first inside", refusal="puts out 8 rows .* tell the recording: record")(_longformer)
case("Longformer, time first inside, told so", differences=False)(
    lambda: _longformer()._replace(samples=torch.arange(B).expand(T, B))
)


GPT2: dict[str, Any] = dict(
    vocab_size=V,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    **ENDS,
)
LLAMA: dict[str, Any] = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
    max_position_embeddings=16, **ENDS,
)  # fmt: skip
_EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)

for _a in ("eager", "sdpa"):
    case(f"GPT-2, {_a} attention")(lambda a=_a: next_words(model_of("GPT2", "LMHeadModel", a, **GPT2)))
    case(f"LLaMA, {_a} attention")(lambda a=_a: next_words(model_of("Llama", "ForCausalLM", a, **LLAMA)))
_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-J": ("GPTJ", GPT2 | dict(rotary_dim=4)),
    "GPT-NeoX": ("GPTNeoX", LLAMA),
    "BLOOM": ("Bloom", dict(vocab_size=V, hidden_size=16, n_layer=2, n_head=2, **ENDS)),
    "Falcon": ("Falcon", dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **ENDS)),
    "OPT": ("OPT", LLAMA | dict(ffn_dim=32, dropout=0.0, word_embed_proj_dim=8)),
    "Phi-3": ("Phi3", LLAMA),
    "Gemma 2": ("Gemma2", LLAMA | dict(head_dim=4)),
    "Qwen 3": ("Qwen3", LLAMA | dict(head_dim=4)),
    "Mamba": ("Mamba", dict(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4, **ENDS)),
    "Mamba-2": (
        "Mamba2",
        dict(
            vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2, chunk_size=4,
            **ENDS,
        ),
    ),
}  # fmt: skip
for _name, (_kind, _options) in _DECODERS.items():
    case(_name)(lambda kind=_kind, options=_options: next_words(model_of(kind, "ForCausalLM", **options)))


@case("RWKV")
def _rwkv():
    sizes = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, intermediate_size=32, context_length=16)
    return unpadded(model_of("Rwkv", "ForCausalLM", **sizes, **ENDS))


@case("xLSTM")
def _xlstm():
    sizes = dict(vocab_size=V, hidden_size=16, num_blocks=2, num_heads=2)
    return unpadded(model_of("xLSTM", "ForCausalLM", **sizes, **ENDS))


def mixture(kind: str, experts: str, **options: Any) -> Setting:
    """A mixture of experts; ``experts`` says how transformers runs them."""
    model = model_of(kind, "ForCausalLM", **LLAMA | options)
    model.set_experts_implementation(experts)
    return next_words(model)


for _way, _experts in {
    "each token with its experts' weights": "batched_mm",
    "tokens by experts": "eager",
    "tokens sorted by experts": "grouped_mm",
}.items():
    _in_order = _experts == "batched_mm"
    case(f"Mixtral, {_way}", differences=_in_order)(lambda e=_experts: mixture("Mixtral", e, **_EXPERTS))


@case("GPT-OSS, each token with its experts' weights")
def _gpt_oss():
    return mixture("GptOss", "batched_mm", head_dim=4, **_EXPERTS)


@case("DeepSeek-V3, each token with its experts' weights")
def _deepseek():
    ranks = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, head_dim=4)
    experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1)
    sizes = dict(moe_intermediate_size=8, first_k_dense_replace=1, num_key_value_heads=4)
    return mixture("DeepseekV3", "batched_mm", **ranks, **experts, **sizes)


_T5 = dict(
    vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
)


@case("Switch Transformers", differences=False)
def _switch():
    sparse = dict(num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2)
    options = dict(router_jitter_noise=0.0, expert_capacity=20, **sparse)
    return translations(model_of("SwitchTransformers", "ForConditionalGeneration", **_T5, **options))


_BART = dict(
    vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, dropout=0.0, decoder_start_token_id=2,
    forced_eos_token_id=2, **ENDS,
)  # fmt: skip
for _a in ("eager", "sdpa"):
    case(f"T5, {_a} attention")(lambda a=_a: translations(model_of("T5", "ForConditionalGeneration", a, **_T5)))
case("LongT5")(lambda: translations(model_of("LongT5", "ForConditionalGeneration", local_radius=3, **_T5)))
case("BART")(lambda: translations(model_of("Bart", "ForConditionalGeneration", **_BART)))
