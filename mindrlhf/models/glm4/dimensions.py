"""GLM-4's dimensions, as the three kinds of configuration say them, and its weights under their three names.

| layout       | who has it                                            | its config.json               |
| ------------ | ----------------------------------------------------- | ----------------------------- |
| MindFormers  | checkpoints of `Glm4RewardModel` and MindFormers      | `model.model_config` of a YAML |
| original     | THUDM/glm-4-9b, THUDM/glm-4-9b-chat                   | `num_layers`, ...              |
| transformers | glm-4-9b-hf, glm-4-9b-chat-hf, `GlmForSequenceClassification` | `num_hidden_layers`, ...  |

The original's names are those of MindFormers but for the embedding's (mindformers/models/glm2/convert_weight.py).
transformers has query, key and value, which lie behind one another in the other two, as three tensors. Everything else
is the same tensor under another name: no weight is transposed or permuted. Knows nothing of MindSpore.
"""
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from mindrlhf.errors import UserError, raise_problems

__all__ = ["Dimensions", "HEAD_NAME", "LM_HEAD_NAME", "MOMENT_BYTES", "ORIGINAL", "TRANSFORMERS", "Weight",
           "backbone_weights", "find_layout", "head_weights", "is_ignored", "may_be_absent", "may_be_beyond",
           "values_of", "weights_of", "with_prefix"]

ORIGINAL, TRANSFORMERS = "original", "transformers"
HEAD_NAME, LM_HEAD_NAME = "v_head0.weight", "transformer.output_layer.weight"
MOMENT_BYTES = 8  # of a value: Adam's two moments, which FP32StateAdamWeightDecay keeps in float32
_ROPE_BASE = 10000.0
_CACHE = re.compile(r"transformer\.encoder\.layers\.\d+\.self_attention\.infer_attention\.\w+\.(key|value)_cache$")

# YAML key -> key of the original's config.json, of transformers'.
_KEYS = {
    "num_layers": ("num_layers", "num_hidden_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "multi_query_group_num": ("multi_query_group_num", "num_key_value_heads"),
    "kv_channels": ("kv_channels", "head_dim"),
    "padded_vocab_size": ("padded_vocab_size", "vocab_size"),
    "seq_length": ("seq_length", "max_position_embeddings"),
    "layernorm_epsilon": ("layernorm_epsilon", "rms_norm_eps"),
    "add_qkv_bias": ("add_qkv_bias", "attention_bias"),
}
# What a configuration may say if it says it at all: anything else is another architecture. YAML and original, then
# transformers.
_FIXED = ({"rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "multi_query_attention": True,
           "apply_residual_connection_post_layernorm": False, "original_rope": True, "interleaved_qkv": False},
          {"hidden_act": "silu"})
_DEFAULTS = {"layernorm_epsilon": 1e-5, "add_qkv_bias": True}


_LARGEST = {"num_layers": 10_000, "seq_length": 1 << 22}  # far beyond any model; others up to int32
_MOST_VALUES = 10 ** 13


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e38  # float32's range


def _or_one(value: Any) -> Any:
    return 1 if value is None else value


@dataclass(frozen=True)
class Dimensions:
    """What decides the shapes and the arithmetic of a GLM-4, under the YAML's names (`model.model_config`)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    multi_query_group_num: int
    kv_channels: int
    padded_vocab_size: int
    seq_length: int
    layernorm_epsilon: float
    add_qkv_bias: bool
    rope_ratio: float

    def __post_init__(self):
        if self.rope_ratio == int(self.rope_ratio):  # 500, as a YAML says it, not 500.0
            object.__setattr__(self, "rope_ratio", int(self.rope_ratio))

    @classmethod
    def from_yaml(cls, config: Mapping[str, Any], place: str) -> "Dimensions":
        """Of a YAML's `model.model_config`; raises `UserError`."""
        return cls._read({key: key for key in _KEYS}, {**_DEFAULTS, **config}, _FIXED[0], place,
                         _or_one(config.get("rope_ratio")), [])

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], layout: str, place: str) -> "Dimensions":
        """Of a config.json; raises `UserError`."""
        if layout == ORIGINAL:
            return cls._read({key: names[0] for key, names in _KEYS.items()}, {**_DEFAULTS, **config}, _FIXED[0],
                             place, _or_one(config.get("rope_ratio")), [])
        problems: List[str] = []
        sections = [config]
        for key in ("rope_parameters", "rope_scaling"):  # where both are given, transformers follows the latter
            if isinstance(config.get(key), Mapping):
                sections.append(config[key])
            elif config.get(key) is not None:
                problems.append(f"{key} is {config[key]!r}, expected an object")
        problems += [f"{key} is {section[key]!r}, expected {expected!r}" for section in sections
                     for key, expected in (("rope_type", "default"), ("type", "default"),
                                           ("partial_rotary_factor", 0.5))
                     if section.get(key, expected) not in (expected, None)]
        theta = next((section["rope_theta"] for section in reversed(sections) if "rope_theta" in section), _ROPE_BASE)
        if not _is_positive(theta):
            problems.append(f"rope_theta is {theta!r}, expected a number above 0")
            theta = _ROPE_BASE
        config = {"attention_bias": True, "num_key_value_heads": 2, **config}  # transformers' defaults
        return cls._read({key: names[1] for key, names in _KEYS.items()}, config, _FIXED[1], place,
                         theta / _ROPE_BASE, problems)

    @classmethod
    def _read(cls, keys: Mapping[str, str], config: Mapping[str, Any], fixed: Mapping[str, Any], place: str,
              rope_ratio: Any, problems: List[str]) -> "Dimensions":
        values = {key: config.get(name) for key, name in keys.items()}
        values["rope_ratio"] = rope_ratio
        problems = problems + [f"{name} is {config[name]!r}, expected {expected!r}" for name, expected in fixed.items()
                               if config.get(name, expected) != expected]
        for field in fields(cls):
            value, name = values[field.name], keys.get(field.name, field.name)
            if field.type is bool:
                right, expected = isinstance(value, bool), "true or false"
            elif field.type is int:
                most = _LARGEST.get(field.name, 2 ** 31 - 1)
                right, expected = _is_positive(value) and isinstance(value, int), "a whole number above 0"
                if right and value > most:
                    right, expected = False, f"at most {most:,}"
            else:
                right, expected = _is_positive(value), "a number above 0"
            if not right:
                problems.append(f"{name} is {value!r}, expected {expected}")
        raise_problems(place, problems)
        size = cls(**values)
        count = values_of(weights_of(replace(size, num_layers=1))) * size.num_layers
        if count > _MOST_VALUES:
            raise UserError(f"{place}: {size}: about {count:.1e} weights, expected at most {_MOST_VALUES:.0e}: no file "
                            "holds them")
        return size

    def as_transformers(self) -> Dict[str, Any]:
        """The part of transformers' config.json that these dimensions decide, for its releases 4 and 5."""
        values = {names[1]: getattr(self, key) for key, names in _KEYS.items()}
        theta = _ROPE_BASE * self.rope_ratio
        return {**values, **_FIXED[1], "rope_theta": theta, "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}}

    def differences(self, other: "Dimensions") -> List[Tuple[str, Any, Any]]:
        """(YAML key, value here, value there) of what is not equal."""
        return [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
                if getattr(self, field.name) != getattr(other, field.name)]


@dataclass(frozen=True)
class Weight:
    """A weight under its three names.

    Attributes:
        name:         MindFormers'
        shape:        MindFormers' and the original's
        original:     the original's name; empty where it has none
        transformers: name -> rows of each tensor that transformers has for it; they lie behind one another
    """

    name: str
    shape: Tuple[int, ...]
    original: str
    transformers: Tuple[Tuple[str, int], ...]

    def sources(self, layout: str) -> List[Tuple[str, Tuple[int, ...]]]:
        """(name, shape) of what it is made of in a layout, in order."""
        if layout == ORIGINAL:
            return [(self.original, self.shape)] if self.original else []
        return [(name, (rows, *self.shape[1:])) for name, rows in self.transformers]


def backbone_weights(size: Dimensions) -> List[Weight]:
    """All weights that a GLM-4 backbone has, in their order from the input to the output."""
    hidden = size.hidden_size
    query, key = size.num_attention_heads * size.kv_channels, size.multi_query_group_num * size.kv_channels
    heads = (("q", query), ("k", key), ("v", key))
    weights = [Weight("transformer.embedding.embedding_weight", (size.padded_vocab_size, hidden),
                      "transformer.embedding.word_embeddings.weight",
                      (("model.embed_tokens.weight", size.padded_vocab_size),))]
    for layer in range(size.num_layers):
        here, there = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"

        def same(name: str, shape: Tuple[int, ...], other: str, here=here, there=there) -> Weight:
            return Weight(f"{here}.{name}", shape, f"{here}.{name}", ((f"{there}.{other}", shape[0]),))

        def fused(kind: str, *rest: int, here=here, there=there) -> Weight:
            name = f"{here}.self_attention.query_key_value.{kind}"
            return Weight(name, (query + 2 * key, *rest), name,
                          tuple((f"{there}.self_attn.{head}_proj.{kind}", rows) for head, rows in heads))

        weights += [same("input_layernorm.weight", (hidden,), "input_layernorm.weight"), fused("weight", hidden)]
        weights += [fused("bias")] if size.add_qkv_bias else []
        weights += [same("self_attention.dense.weight", (hidden, query), "self_attn.o_proj.weight"),
                    same("post_attention_layernorm.weight", (hidden,), "post_attention_layernorm.weight"),
                    same("mlp.dense_h_to_4h.weight", (2 * size.ffn_hidden_size, hidden), "mlp.gate_up_proj.weight"),
                    same("mlp.dense_4h_to_h.weight", (hidden, size.ffn_hidden_size), "mlp.down_proj.weight")]
    norm = "transformer.encoder.final_layernorm.weight"
    return [*weights, Weight(norm, (hidden,), norm, (("model.norm.weight", hidden),))]


def head_weights(size: Dimensions) -> List[Weight]:
    """The heads that a checkpoint may have behind the backbone: a language model's, and the value head."""
    return [Weight(LM_HEAD_NAME, (size.padded_vocab_size, size.hidden_size), LM_HEAD_NAME,
                   (("lm_head.weight", size.padded_vocab_size),)),
            Weight(HEAD_NAME, (1, size.hidden_size), "", (("score.weight", 1),))]


def weights_of(size: Dimensions) -> List[Weight]:
    """The weights of the reward model."""
    return [*backbone_weights(size), *(weight for weight in head_weights(size) if weight.name != LM_HEAD_NAME)]


def values_of(weights: Sequence[Weight]) -> int:
    """How many numbers they have together."""
    return sum(math.prod(weight.shape) for weight in weights)


def find_layout(names: Sequence[str], place: Path) -> str:
    """ORIGINAL or TRANSFORMERS, by the names of a checkpoint's tensors.

    Raises:
        UserError: neither.
    """
    if any(name.startswith("transformer.encoder.layers.") for name in names):
        return ORIGINAL
    if any(name.startswith("model.layers.") and ".mlp.gate_up_proj." in name for name in names):
        return TRANSFORMERS
    raise UserError(f"{place}: not a GLM-4 model: found {', '.join(sorted(names)[:3]) or 'no tensors'}; expected names "
                    "as transformer.encoder.layers.0.mlp.dense_h_to_4h.weight (THUDM/glm-4-9b) or "
                    "model.layers.0.mlp.gate_up_proj.weight (glm-4-9b-hf)")


def may_be_absent(name: str) -> bool:
    """Whether training may begin without a weight: a base model has no value head, which then starts from its
    documented initialisation.
    """
    return name == HEAD_NAME


def may_be_beyond(name: str) -> bool:
    """Whether a checkpoint may have a weight that the reward model has no use for: a base model's LM head, and the
    caches of keys and values that each layer of MindFormers has since 1.6 for inference.
    """
    return name.startswith("transformer.output_layer.") or bool(_CACHE.match(name))


def is_ignored(name: str) -> bool:
    """Whether a tensor is no weight: the rotary table's frequencies, which follow from the configuration."""
    return name.endswith(("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq"))


def with_prefix(name: str) -> str:
    """MindFormers' name of a parameter of the original MindRLHF example, whose backbone has no `transformer.`.

    >>> with_prefix("encoder.final_layernorm.weight"), with_prefix("adam_m.embedding.embedding_weight")
    ('transformer.encoder.final_layernorm.weight', 'adam_m.transformer.embedding.embedding_weight')
    >>> with_prefix("v_head0.weight")
    'v_head0.weight'
    """
    return re.sub(r"^((?:adam_[mv]|moment[12]|accu_grads)\.)?(?=(embedding|encoder|output_layer)\.)",
                  r"\1transformer.", name)
