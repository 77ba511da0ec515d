"""Writes small GGUF files as llama.cpp's converter does, from the tensors of a Hugging Face folder."""

import gguf
import numpy as np

KINDS = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where the float16 numbers lie in a block of the types that gguf reads and cannot write.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
}


def stored_name(name):
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    module, leaf = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{leaf}"
    layer, module = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{leaf}"


def paired(array, heads):
    """Rows of q or k in llama.cpp's order: channels i and i + H / 2 of a head become 2i and 2i + 1."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def random_blocks(rng, shape, kind):
    """Blocks of any type, as bytes [rows, bytes of a row]: all their bits are drawn, and their scales are small."""
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    blocks = rng.integers(0, 256, (np.prod(shape) // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = rng.uniform(-2e-4, 2e-4, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def llama_metadata(config):
    """What llama.cpp's converter writes of a `ModelConfig`, by the key without the architecture."""
    return {
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }


def write(path, tensors, config, kind="F32", arch="llama", metadata=(), general=(), extra=(), endian=None):
    """Write a file of Hugging Face tensors (by name, float32).

    kind: of the matrices, a name or a function of the tensor's name. metadata changes `llama_metadata` (None leaves a key
    out), general gives whole keys, extra tensors are written as they are.
    """
    writer = gguf.GGUFWriter(path, arch, endianess=gguf.GGUFEndian.LITTLE if endian is None else endian)
    for key, value in (llama_metadata(config) | dict(metadata)).items():
        if value is not None:
            _add(writer, f"{arch}.{key}", value)
    for key, value in dict(general).items():
        _add(writer, key, value)
    rng = np.random.default_rng(11)
    for name, array in tensors.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = paired(array, config.n_heads if "q_proj" in name else config.n_kv_heads)
        its = "F32" if array.ndim == 1 else kind(name) if callable(kind) else kind
        if its in HALVES:
            writer.add_tensor(stored_name(name), random_blocks(rng, array.shape, its), raw_dtype=KINDS[its])
        else:
            writer.add_tensor(stored_name(name), gguf.quantize(array, KINDS[its]), raw_dtype=KINDS[its])
    for name, array in dict(extra).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    types = gguf.GGUFValueType
    kind = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    writer.add_key_value(key, value, kind[type(value)])
