"""Write tests/reference/*.npz and adam_curves.json: what PyTorch and transformers make of small GLM reward models.

    bash scripts/compare_with_torch.sh  # makes an environment for it, and runs it
    python tests/reference/make_glm_reference.py [--output FOLDER]

The models are transformers' own `GlmModel` with random weights from a fixed seed and a linear score head; the loss is
written out in PyTorch from its formula. A file holds one model: its dimensions, its weights under transformers' names
and under MindFormers', the inputs, and scores, loss and gradients. adam_curves.json holds the losses of 50 steps of
`torch.optim.Adam`, see tests/reference/adam_curve.py. The committed files keep the tests free of PyTorch;
where it is there, the tests run this script and compare with what it writes (see tests/conftest.py).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GlmConfig, GlmModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import adam_curve  # noqa: E402

SEQ = 12
LENGTHS = (9, 12, 6, 9)  # rows 0, 1 chosen; rows 2, 3 rejected
# Name -> dimensions under MindFormers' names.
CASES = {
    "grouped": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "multi_query_group_num": 2,
                "kv_channels": 8, "ffn_hidden_size": 48, "padded_vocab_size": 64, "layernorm_epsilon": 1e-5,
                "rope_ratio": 1},
    "rope500": {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 4, "multi_query_group_num": 2,
                "kv_channels": 16, "ffn_hidden_size": 40, "padded_vocab_size": 56, "layernorm_epsilon": 1.5625e-07,
                "rope_ratio": 500},
    "one_group": {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 8, "multi_query_group_num": 1,
                  "kv_channels": 4, "ffn_hidden_size": 20, "padded_vocab_size": 48, "layernorm_epsilon": 1.5625e-07,
                  "rope_ratio": 1},
    "ungrouped_rope500": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "multi_query_group_num": 2,
                          "kv_channels": 8, "ffn_hidden_size": 32, "padded_vocab_size": 64, "layernorm_epsilon": 1e-5,
                          "rope_ratio": 500},
}


def build_model(size: dict) -> GlmModel:
    """A float32 GlmModel in evaluation mode with random weights, biases and norms."""
    config = GlmConfig(vocab_size=size["padded_vocab_size"], hidden_size=size["hidden_size"],
                       intermediate_size=size["ffn_hidden_size"], num_hidden_layers=size["num_layers"],
                       num_attention_heads=size["num_attention_heads"], head_dim=size["kv_channels"],
                       num_key_value_heads=size["multi_query_group_num"], attention_bias=True,
                       rms_norm_eps=size["layernorm_epsilon"], max_position_embeddings=128,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * size["rope_ratio"],
                                        "partial_rotary_factor": 0.5},
                       pad_token_id=None,  # with one, PyTorch gives the pad row of the embedding no gradient
                       attention_dropout=0.0, attn_implementation="eager")
    model = GlmModel(config).float().eval()
    generator = torch.Generator().manual_seed(16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def mindformers_tensors(values: dict, layers: int) -> dict:
    """Tensors of a GlmModel (name without prefix -> array) under the names and in the layout of MindFormers."""
    out = {"transformer.embedding.embedding_weight": values["embed_tokens.weight"],
           "transformer.encoder.final_layernorm.weight": values["norm.weight"]}
    for layer in range(layers):
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


def pair_loss(scores: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of the masked mean over tokens of -log sigmoid(chosen - rejected)."""
    pairs = len(loss_mask)
    token_loss = -torch.nn.functional.logsigmoid(scores[:pairs] - scores[pairs:]) * loss_mask
    return (token_loss.sum(-1) / loss_mask.sum(-1)).mean()


def make_case(size: dict) -> dict:
    """Name -> array of one file."""
    torch.manual_seed(16)
    model = build_model(size)
    head = torch.nn.Parameter(0.3 * torch.randn(1, size["hidden_size"]))
    pad = size["padded_vocab_size"] - 1
    rng = np.random.default_rng(16)
    ids = np.full((4, SEQ), pad, np.int64)
    mask = np.zeros((4, SEQ), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(0, pad, length)
        mask[row, :length] = 1
    ids[2:, :3] = ids[:2, :3]  # a common prompt
    loss_mask = np.zeros((2, SEQ), np.float32)
    for pair in range(2):
        loss_mask[pair, 3:max(LENGTHS[pair], LENGTHS[pair + 2])] = 1

    hidden = model(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state
    scores = (hidden @ head.T).squeeze(-1)
    loss = pair_loss(scores, torch.tensor(loss_mask))
    loss.backward()
    end_scores = scores[torch.arange(4), torch.tensor(LENGTHS) - 1]

    left_ids, left_mask = np.full_like(ids, pad), np.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        left_ids[row, SEQ - length:], left_mask[row, SEQ - length:] = ids[row, :length], 1
    with torch.no_grad():
        left_hidden = model(input_ids=torch.tensor(left_ids), attention_mask=torch.tensor(left_mask),
                            use_cache=False).last_hidden_state
    left_end_scores = (left_hidden[:, -1] @ head.T).squeeze(-1)

    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    arrays = {f"hf/model.{name}": value for name, value in weights.items()}
    for kind, values in (("weight", weights), ("gradient", gradients)):
        arrays.update({f"{kind}/{name}": value
                       for name, value in mindformers_tensors(values, size["num_layers"]).items()})
    arrays["hf/score.weight"] = arrays["weight/v_head0.weight"] = head.detach().numpy()
    arrays["gradient/v_head0.weight"] = head.grad.numpy()
    arrays.update(dimensions=np.array(json.dumps({**size, "seq_length": 16, "pad_token_id": pad})),
                  input_ids=ids.astype(np.int32), attention_mask=mask.astype(np.int32), loss_mask=loss_mask,
                  end_ind=np.array(LENGTHS, np.int32), token_scores=scores.detach().numpy(),
                  end_scores=end_scores.detach().numpy(), loss=loss.detach().numpy(),
                  left_input_ids=left_ids.astype(np.int32), left_attention_mask=left_mask.astype(np.int32),
                  left_end_scores=left_end_scores.detach().numpy(),
                  versions=np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"]))
    return arrays


def adam_losses(name: str) -> list:
    """The loss of each step, before its update, of PyTorch's Adam on a set of pairs."""
    model = build_model(adam_curve.DIMENSIONS)
    start = {key: torch.tensor(array) for _, parts in adam_curve.initial_weights().values()
             for key, array in parts.items()}
    head = torch.nn.Parameter(start.pop("score.weight"))
    model.load_state_dict({key.removeprefix("model."): value for key, value in start.items()})

    def loss_of(ids, _, loss_mask, __):
        scores = (model(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state @ head.T).squeeze(-1)
        return pair_loss(scores, torch.tensor(loss_mask))

    return losses_of_adam([*model.parameters(), head], name, loss_of)


def losses_of_adam(parameters, name: str, loss_of) -> list:
    """The loss of each step on a set of pairs, before its update; `loss_of` a batch of `adam_curve.batches`."""
    optimizer = torch.optim.Adam(parameters, lr=adam_curve.LEARNING_RATE, betas=adam_curve.BETAS,
                                 eps=adam_curve.EPSILON)
    losses = []
    for batch in adam_curve.batches(name):
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="default: where this script is")
    folder = parser.parse_args().output
    for name, size in CASES.items():
        arrays = make_case(size)
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(f"{name}.npz: {(folder / f'{name}.npz').stat().st_size} bytes, loss {arrays['loss']:.6f}, "
              f"end scores {arrays['end_scores'].tolist()}")
    target = folder / "adam_curves.json"
    curves = json.loads(target.read_text()) if target.is_file() else {}
    for name, (pairs, _) in adam_curve.CURVES.items():
        if pairs.is_file():
            curves[name] = adam_losses(name)
            print(f"{name}: {len(curves[name])} losses, first {curves[name][0]:.6f}, last {curves[name][-1]:.6f}")
    target.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
