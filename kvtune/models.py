"""All we know of Hugging Face models: loading, what shapes
their cache, their fingerprint, their rotary embedding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.demo import LABEL, demo_folder
from kvtune.errors import MissingInputError, ResourceError, UnsupportedError, UsageError, suggest
from kvtune.files import canonical_json
from kvtune.placement import DEVICE_MAPS, input_device, layer_devices, weights
from kvtune.rope import Rope

FULL = "full_attention"
HANDED = "handed"  # the kind of a layer that is handed another's keys and values
_KV_WEIGHT = re.compile(
    r"\.(k_proj|v_proj|qkv_proj|query_key_value|Wqkv|c_attn|k_norm)\.(weight|bias)$"
)


@dataclass(frozen=True)
class LayerFacts:
    """One attention layer: its kind ("full_attention",
    "sliding_attention", ...) and head shapes."""

    kind: str
    kv_heads: int
    query_heads: int
    head_dim: int
    window: int | None = None  # tokens that a sliding layer looks back
    reads: int | None = None  # the layer whose keys and values the model hands it: it has none


@dataclass(frozen=True)
class Facts:
    """What shapes a model's cache."""

    architecture: str
    layers: tuple[LayerFacts, ...]
    max_positions: int
    vocab: int

    def compressible(self) -> tuple[int, ...]:
        """Indices of the full-attention layers; sliding layers keep
        transformers' own cache layer, and layers that read another's have none."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind == FULL)

    def handed(self, layer: int) -> int:
        """To how many others the model hands a layer's keys and values."""
        return sum(other.reads == layer for other in self.layers)


def facts(config: Any) -> Facts:
    """Reads a transformers config.

    Raises:
        UnsupportedError: encoder-only, encoder-decoder, MLA and linear-attention models, by name.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    _refuse_unsupported(config, text)
    count = text.num_hidden_layers
    own = count - (getattr(text, "num_kv_shared_layers", None) or 0)
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None)
        or [FULL if window is None else "sliding_attention"] * count
    )
    layers = tuple(
        LayerFacts(kind, *_heads(text, i), window if kind == "sliding_attention" else None)
        if i < own
        else LayerFacts(HANDED, *_heads(text, i), reads=_last(kinds[:own], kind))
        for i, kind in enumerate(kinds)
    )
    name = (config.architectures or [type(config).__name__])[0]
    return Facts(name, layers, int(text.max_position_embeddings), int(text.vocab_size))


def _heads(text: Any, layer: int) -> tuple[int, int, int]:
    """Kv heads, query heads and head size of a layer; those of Gemma 4 are not all alike."""
    if getattr(text, "per_layer_config", None):
        text = text.per_layer_config[layer]
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return kv_heads, heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def _last(kinds: Sequence[str], kind: str) -> int:
    """The last layer of a kind: the one whose keys and values later layers of it are handed."""
    return len(kinds) - 1 - list(reversed(kinds)).index(kind)


def _refuse_unsupported(config: Any, text: Any) -> None:
    name = (config.architectures or [config.model_type])[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} is an encoder-decoder model; kvtune works on decoder-only language models."
        )
    head = (config.architectures or [CAUSAL.get(config.model_type, "")])[0]
    # a BERT with a language modelling head sees both ways unless it is told to be a decoder
    both_ways = getattr(config, "is_decoder", True) is False and "CausalLM" not in head
    if both_ways or not re.search("CausalLM|LMHead|Conditional", head):
        raise UnsupportedError(
            f"{name} is no causal language model (encoder-only models keep no KV cache)."
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{name} caches a compressed latent (MLA), which kvtune does not support."
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    if odd := kinds - {FULL, "sliding_attention"}:
        raise UnsupportedError(
            f"{name} has {', '.join(sorted(odd))} layers, which kvtune does not support."
        )


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    offline: bool = False,
    device_map: str = "",
) -> tuple[Any, Any]:
    """Loads model and tokenizer by `demo`, a local folder
    (safetensors or one GGUF file) or a hub id.

    Never runs remote code and never reads a pickle. `auto` is float32 on a CPU (bfloat16 noise
    hides what 8 bits cost) and bfloat16 on a GPU.

    Args:
        device_map: how accelerate spreads the model over all GPUs and the CPU ("auto"), in place
            of one device.

    Raises:
        MissingInputError: no such model, or not cached and offline.
        UnsupportedError: see `facts`.
        ResourceError: out of memory.
        UsageError: no such device, dtype or device map, or a device beside a device map.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = pick_device(device)
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    spread = _spread(device_map, device)
    source = _source(name, offline, options)
    try:
        facts(AutoConfig.from_pretrained(source, **options))
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=pick_dtype(dtype, place),
            attn_implementation="sdpa",
            **({} if "gguf_file" in options else {"use_safetensors": True}),  # never a pickle
            **spread,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "offload" in reason:
            what = f"{name} does not fit into the memory of all GPUs and the CPU together."
            raise ResourceError(what, "Give a smaller model or a machine with more.") from error
        hint = (
            suggest(name, ("demo",))
            if len(name) < 8
            else "Give a hub id, a local folder, or `demo`."
        )
        raise MissingInputError(f"The model {name!r} cannot be loaded: {reason}", hint) from error
    model = model.eval().requires_grad_(False)
    try:
        return model if spread else model.to(place), tokenizer
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{name} does not fit into the memory of {place}.",
            "Use --device-map auto, or --device cpu.",
        ) from error


def _spread(device_map: str, device: str) -> dict[str, str]:
    """The option of from_pretrained that spreads a model over devices, or none."""
    if not device_map:
        return {}
    if device != "auto":
        what = f"--device {device} is one device, --device-map {device_map} spreads over all."
        raise UsageError(what, "Leave one of them out.")
    if device_map not in DEVICE_MAPS:
        hint = suggest(device_map, DEVICE_MAPS)
        raise UsageError(f"There is no device map {device_map!r}.", hint)
    return {"device_map": device_map}


def _source(name: str, offline: bool, options: dict[str, Any]) -> str:
    if name == "demo":
        return str(demo_folder(offline))
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) != 1:
            raise MissingInputError(
                f"{name} holds no config.json and {len(ggufs)} GGUF files instead of one."
            )
        from transformers import GgufConfig

        options["gguf_file"] = ggufs[0].name
        options["quantization_config"] = GgufConfig(dequantize=True)
    return str(folder) if folder.is_dir() else name


def pick_device(device: str) -> torch.device:
    """Returns the device of `auto`, `cpu`, `cuda` or `cuda:N`;
    UsageError when torch cannot use it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(
            f"There is no device {device!r}.", suggest(device, ("auto", "cpu", "cuda"))
        ) from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device.", "Run: kvtune doctor")
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Returns the torch dtype of `auto`, `float32`, `bfloat16` or `float16`."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in known:
        raise UsageError(f"There is no dtype {dtype!r}.", suggest(dtype, (*known, "auto")))
    return known[dtype]


def label(name: str) -> str:
    """The name that stands in a recipe: never a local path, which means nothing to others."""
    return LABEL if name == "demo" else Path(name).name if Path(name).exists() else name


def fingerprint(model: Any) -> str:
    """Hashes what makes a cache this model's: cache-shaping
    config fields and the k/v projection weights.

    Weights are hashed as bfloat16, so that one model has one fingerprint whether it is loaded in 16
    or 32 bits.
    """
    known = facts(model.config)
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None)
    # not the architecture, which a config has only once it was saved
    shape = [text.model_type, [_facts_of(layer) for layer in known.layers], known.vocab, rope]
    total = hashlib.sha256(canonical_json(shape).encode())
    # accelerate may keep weights off the model, where state_dict has none
    held = {name: w.to(torch.bfloat16) for name, w in weights(model, _KV_WEIGHT)}
    if not held:
        raise UnsupportedError(
            f"{type(model).__name__} names its key and value weights in a way that kvtune does not "
            "know, so it cannot be told from other models."
        )
    for name, weight in sorted(held.items()):
        raw = weight.contiguous().view(torch.uint8)
        total.update(f"{name} {tuple(weight.shape)} ".encode())
        total.update(raw.numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


def _facts_of(layer: LayerFacts) -> dict[str, Any]:
    """What a fingerprint hashes; a layer that reads no other has what it always had."""
    return {name: value for name, value in vars(layer).items() if (name, value) != ("reads", None)}


def places(model: Any) -> dict[int, torch.device]:
    """The device of each layer's keys and values: more than one under a device map."""
    return layer_devices(model, _KV_WEIGHT)


def ropes(model: Any) -> dict[int, Rope]:
    """Returns the rotary embedding of each full-attention layer, checked against the model itself.

    Raises:
        UnsupportedError: no rotary module, frequencies that change with the length, or keys that do
        not turn back.
    """
    full = facts(model.config).compressible()
    if not full:
        return {}
    module = next(
        (m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"), None
    )
    name = type(model).__name__
    if module is None:
        raise UnsupportedError(
            f"{name} has no rotary embedding, so its keys cannot be stored pre-RoPE."
        )
    kinds = getattr(module, "rope_type", "default")
    if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        raise UnsupportedError(
            f"{name} changes its rotary frequencies with the length: pre-RoPE keys are undefined."
        )
    layer_type = FULL if isinstance(kinds, dict) else None
    for interleaved in (False, True):
        rope = Rope(module, layer_type, interleaved)
        if _turns_back(model, rope):
            return dict.fromkeys(full, rope)
    raise UnsupportedError(
        f"{name} rotates its keys in a way that kvtune does not know: leave out derope."
    )


@torch.no_grad()
def _turns_back(model: Any, rope: Rope) -> bool:
    """Runs the same tokens at two places: attention sees only
    distances, so pre-RoPE keys must come out equal."""
    from transformers import DynamicCache

    device = input_device(model)
    layer = facts(model.config).compressible()[0]
    tokens = (
        torch.arange(1, 9, device=device)[None]
        % model.config.get_text_config(decoder=True).vocab_size
    )
    plain: list[Tensor] = []
    for start in (0, 37):
        cache = DynamicCache()
        positions = torch.arange(start, start + 8, device=device)
        model(tokens, position_ids=positions[None], past_key_values=cache, use_cache=True)
        keys = cache.layers[layer].keys
        assert isinstance(keys, Tensor)
        plain.append(rope.unturn(keys.float(), positions))
    error = (plain[0] - plain[1]).norm() / plain[0].norm()
    return bool(error < (1e-3 if model.dtype == torch.float32 else 3e-2))
