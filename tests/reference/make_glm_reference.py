"""Write tests/reference/glm_reference.npz: scores, loss and gradients of a tiny GLM reward model in PyTorch.

    pip install torch==2.13.0 transformers numpy
    python tests/reference/make_glm_reference.py

The only file of the project that imports torch and transformers. The model is transformers' own `GlmModel` (2 layers,
random weights from a fixed seed) with a linear score head; the loss is written out in PyTorch from its formula. The
file holds the weights under MindFormers' names, the inputs, and what PyTorch makes of them.
"""
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GlmConfig, GlmModel

LAYERS, HIDDEN, HEADS, KV_GROUPS, HEAD_DIM, FFN, VOCAB, SEQ, PAD = 2, 32, 4, 2, 8, 48, 64, 12, 63
LENGTHS = (9, 12, 6, 9)  # rows 0, 1 chosen; rows 2, 3 rejected


def build_model() -> GlmModel:
    """A float32 GlmModel in evaluation mode with random weights, biases and norms."""
    config = GlmConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
                       num_attention_heads=HEADS, num_key_value_heads=KV_GROUPS, head_dim=HEAD_DIM,
                       attention_bias=True, rms_norm_eps=1e-5, max_position_embeddings=SEQ, pad_token_id=None,
                       attention_dropout=0.0, attn_implementation="eager")  # no pad id: PyTorch freezes its embedding
    model = GlmModel(config).float().eval()
    generator = torch.Generator().manual_seed(16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def mindformers_tensors(values: dict) -> dict:
    """Tensors of a GlmModel (name without prefix -> array) under the names and in the layout of MindFormers."""
    out = {"transformer.embedding.embedding_weight": values["embed_tokens.weight"],
           "transformer.encoder.final_layernorm.weight": values["norm.weight"]}
    for layer in range(LAYERS):
        source, target = f"layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            out[f"{target}self_attention.query_key_value.{kind}"] = np.concatenate(
                [values[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"])
        out[f"{target}self_attention.dense.weight"] = values[f"{source}self_attn.o_proj.weight"]
        out[f"{target}mlp.dense_h_to_4h.weight"] = values[f"{source}mlp.gate_up_proj.weight"]
        out[f"{target}mlp.dense_4h_to_h.weight"] = values[f"{source}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{target}{norm}.weight"] = values[f"{source}{norm}.weight"]
    return out


def main() -> None:
    torch.manual_seed(16)
    model = build_model()
    head = torch.nn.Parameter(0.3 * torch.randn(1, HIDDEN))
    rng = np.random.default_rng(16)
    ids = np.full((4, SEQ), PAD, np.int64)
    mask = np.zeros((4, SEQ), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(0, PAD, length)
        mask[row, :length] = 1
    ids[2:, :3] = ids[:2, :3]  # a common prompt
    loss_mask = np.zeros((2, SEQ), np.float32)
    for pair in range(2):
        loss_mask[pair, 3:max(LENGTHS[pair], LENGTHS[pair + 2])] = 1

    hidden = model(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state
    scores = (hidden @ head.T).squeeze(-1)
    pair_mask = torch.tensor(loss_mask)
    token_loss = -torch.nn.functional.logsigmoid(scores[:2] - scores[2:]) * pair_mask
    loss = (token_loss.sum(-1) / pair_mask.sum(-1)).mean()
    loss.backward()
    end_scores = scores[torch.arange(4), torch.tensor(LENGTHS) - 1]

    left_ids, left_mask = np.full_like(ids, PAD), np.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        left_ids[row, SEQ - length:], left_mask[row, SEQ - length:] = ids[row, :length], 1
    with torch.no_grad():
        left_hidden = model(input_ids=torch.tensor(left_ids), attention_mask=torch.tensor(left_mask),
                            use_cache=False).last_hidden_state
    left_end_scores = (left_hidden[:, -1] @ head.T).squeeze(-1)

    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    arrays = {f"weight/{name}": value for name, value in mindformers_tensors(weights).items()}
    arrays.update({f"gradient/{name}": value for name, value in mindformers_tensors(gradients).items()})
    arrays["weight/v_head0.weight"] = head.detach().numpy()
    arrays["gradient/v_head0.weight"] = head.grad.numpy()
    arrays.update(input_ids=ids.astype(np.int32), attention_mask=mask.astype(np.int32), loss_mask=loss_mask,
                  end_ind=np.array(LENGTHS, np.int32), token_scores=scores.detach().numpy(),
                  end_scores=end_scores.detach().numpy(), loss=loss.detach().numpy(),
                  left_input_ids=left_ids.astype(np.int32), left_attention_mask=left_mask.astype(np.int32),
                  left_end_scores=left_end_scores.detach().numpy(),
                  versions=np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"]))
    target = Path(__file__).with_name("glm_reference.npz")
    np.savez_compressed(target, **arrays)
    print(f"{target.name}: {target.stat().st_size} bytes, loss {loss.item():.6f}, end scores {end_scores.tolist()}")


if __name__ == "__main__":
    main()
