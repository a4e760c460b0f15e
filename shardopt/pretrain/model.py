"""Build a transformers causal language model without ever holding all of it, and give it its first weights.

The model is made with parameters on the meta device (buffers are real: rotary tables are small, and recomputing
them by hand is where others go wrong). The engine shards it and calls `initialise`, which gives every parameter
storage and then runs the model's own initialisation, with each random tensor drawn whole on the CPU from a seed
of its own and only the elements held here kept. So initial weights do not depend on the engine or world size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from unittest import mock

import torch
from pydantic import ConfigDict
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig

from shardopt.engines.base import DTYPES
from shardopt.errors import InputError, did_you_mean, few
from shardopt.pretrain.section import Section
from shardopt.slices import canonical_name, layout_of, local_tensor, name_key, named_parameters, persistent_buffers

if TYPE_CHECKING:  # what a config does not need, and takes seconds to import, is imported where a model is made
    from transformers import PreTrainedModel

# A parameter with a value of its own from the constructor is a scalar or a vector.
_MOST_CONSTRUCTED = 2**20
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


class ModelConfig(Section):
    """`model_type` and that type's own configuration keys, or `path` to a folder with a config.json."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model_type: str | None = None
    """Any causal-LM type that transformers knows: llama, qwen3, gpt2, ..."""
    path: str | None = None
    """A local folder, whose safetensors weights are loaded if it has any, else only its config is used; or the name of
    a model on the hub, whose weights are."""
    revision: str | None = None
    """On the hub: branch, tag or commit; None is the newest."""
    commit: str | None = None
    """On the hub: the commit that `revision` was at when the run began, recorded then."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the trained weights and their gradients; bf16 halves both, and `optimizer.master_weights` says what is kept of
    the bits that are rounded off."""
    attention: str | None = None
    """How attention is computed, as transformers' attn_implementation: sdpa, eager, flash_attention_2, flex_attention,
    ...; null: as transformers chooses."""
    trust_remote_code: bool = False
    """Run the Python code in the folder `path`, where its config or its tokenizer names classes there."""

    @property
    def weights(self) -> torch.dtype:
        """`dtype`, as torch has it."""
        return DTYPES[self.dtype]


def transformers_config(section: ModelConfig, vocab_size: int, eos_token_id: int, block_size: int) -> PretrainedConfig:
    """The transformers configuration that `section` describes, checked against the tokenizer and the data.

    Args:
        vocab_size: of the tokenizer; the model's own where `model.vocab_size` is not given.
        eos_token_id: the tokenizer's end of a document.
        block_size: tokens a sequence.

    Raises:
        InputError: an unknown type or key, a vocabulary smaller than the tokenizer's, blocks too long.
    """
    given = dict(section.model_extra or {})
    if section.attention is not None:
        _known_attention(section.attention)
    if (section.model_type is None) == (section.path is None):
        raise InputError(
            "model: give either model_type (such as llama) or path (a folder with a config.json); to replace the "
            "whole section of a file, write model='{path: ...}'"
        )
    if section.path is not None:
        if not (Path(section.path) / "config.json").is_file():
            raise InputError(f"model.path: {section.path} holds no config.json")
        base, _ = PretrainedConfig.get_config_dict(section.path)
        model_type = base.pop("model_type", None)
    else:
        model_type = section.model_type
        base = {"vocab_size": vocab_size, "pad_token_id": None}
        base |= {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    try:
        if section.trust_remote_code and section.path is not None:
            defaults = type(AutoConfig.from_pretrained(section.path, trust_remote_code=True))()
        else:
            defaults = AutoConfig.for_model(model_type)
    except ValueError:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        hint = did_you_mean(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if "auto_map" in base:
            hint = "; to run the code in its folder, set model.trust_remote_code=true"
        raise InputError(f"model.model_type: transformers knows no {model_type!r}{hint}") from None
    known = set(defaults.to_dict()) | set(defaults.attribute_map)
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, "model.")
            raise InputError(f"model.{key}: a {model_type} configuration has no such key{hint}")
    if getattr(defaults, "is_decoder", True) is False:
        base["is_decoder"] = True  # else BERT and its kin attend to the tokens that they are to predict
    try:
        config = type(defaults)(**(base | given))
    except Exception as e:  # whatever the type's own checks raise
        raise InputError(f"model: {model_type} refuses this configuration: {e}") from e
    if config.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size: {config.vocab_size} is smaller than the tokenizer's vocabulary of {vocab_size}"
        )
    for key, limit in position_limits(config).items():
        if limit < block_size:
            raise InputError(
                f"data.block_size: {block_size} is over this model's limit, model.{key} = {limit}: "
                f"lower data.block_size or raise model.{key}"
            )
    config.name_or_path = section.path or ""  # where its code is
    config.use_cache = True  # for those who load the export; training asks for no cache at each call
    return config


def position_limits(config: PretrainedConfig) -> dict[str, int]:
    """The most tokens of a sequence that the model takes, by the keys that say so; empty where none does."""
    limits = {key: getattr(config, key, None) for key in _LENGTH_KEYS}
    return {key: limit for key, limit in limits.items() if isinstance(limit, int)}


def _known_attention(name: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in names:
        hint = did_you_mean(name, names) or f"; known: {', '.join(names)}"
        raise InputError(f"model.attention: transformers knows no {name!r}{hint}")


def meta_model(
    config: PretrainedConfig,
    trust_remote_code: bool = False,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model with parameters of `dtype` on the meta device and real buffers on the CPU, weights tied.

    Args:
        trust_remote_code: run the code in the config's folder, if it names a class there.
        attention: see `ModelConfig.attention`.

    Raises:
        InputError: transformers has no causal language model of this type, or refuses to build this one; or it
            needs a padding token.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _constructing() as constructed:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attention
            )
    except Exception as e:
        key, how = ("model.attention", f" with {attention}") if attention is not None else ("model", "")
        raise InputError(f"{key}: transformers cannot build this {config.model_type}{how}: {e}") from e
    config.architectures = [type(model).__name__]
    for module in model.modules():
        if getattr(config, "pad_token_id", None) is None and hasattr(module, "create_position_ids_from_input_ids"):
            raise InputError(
                f"model.pad_token_id: {config.model_type} numbers positions from the padding token's id on, so it "
                f"needs one: a token that the text never holds (0, NUL, with the byte tokenizer), and "
                f"model.max_position_embeddings of at least data.block_size + that id + 1"
            )
        # transformers believes it has initialised them
        if hasattr(module, "_is_hf_initialized"):
            del module._is_hf_initialized
    model.tie_weights()
    model._constructed = {
        canonical_name(name): constructed[param] for name, param in model.named_parameters() if param in constructed
    }
    return model


class _Writes(TorchDispatchMode):
    """Notes which tensors in-place operations wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[Tensor] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self.written.add(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _constructing() -> Iterator[dict[Tensor, Tensor]]:
    """Parameters go to the meta device as modules register them; yields the values that small ones had then.

    Some parameters get their first value from the constructor alone (the slopes of Apertus' activation), and
    transformers' initialisation leaves them be. A value that the constructor overwrote later is not kept.
    """
    register = nn.Module.register_parameter
    constructed: dict[Tensor, Tensor] = {}

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            moved = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            module._parameters[name] = moved
            if param.numel() <= _MOST_CONSTRUCTED:
                constructed[moved] = param.detach()

    writes = _Writes()
    with mock.patch.object(nn.Module, "register_parameter", register_on_meta), writes:
        yield constructed
    for param in writes.written & constructed.keys():
        del constructed[param]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each block's activations be computed again in backward. Changes the model."""
    # Transformers 5 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_attention(attention: str | None, device: torch.device, compute_dtype: str) -> None:
    """Raise InputError where `attention` (see ModelConfig) cannot train on `device` with `engine.compute_dtype`."""
    flash = attention is not None and attention.startswith("flash")
    if device.type == "cpu" and (flash or attention == "flex_attention"):
        raise InputError(f"model.attention: {attention} does not train on the CPU; take sdpa or eager")
    if flash and compute_dtype == "fp32":
        raise InputError(f"model.attention: {attention} does not compute in fp32; set engine.compute_dtype=bf16")


def routed_experts(config: PretrainedConfig) -> int:
    """Experts among which a router of this model chooses; 0 where it is no mixture of experts."""
    counts = (getattr(config, name, None) for name in _EXPERT_KEYS)
    return max((count for count in counts if isinstance(count, int) and count > 1), default=0)


def weight_files(folder: str | None) -> list[Path]:
    """The safetensors files of `model.path`; none where the model starts from random weights."""
    return [] if folder is None else sorted(Path(folder).glob("*.safetensors"))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: the longest ModuleList of modules of one class.

    Raises:
        InputError: the model has no such list.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    if not lists:
        raise InputError(f"model: {type(model).__name__} has no list of transformer blocks to shard")
    return max(lists, key=len)


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Replace meta parameters by empty ones on `device`, tied ones by one tensor; move the buffers there.

    `Module.to_empty` does neither: it unties weights and forgets the buffers' values.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if param.is_meta and param not in made:
                made[param] = nn.Parameter(torch.empty_like(param, device=device), param.requires_grad)
            setattr(module, name, made.get(param, param))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


class _DrawWhole(_Writes):
    """In-place random ops draw the whole tensor on the CPU, each from a seed of its own, and keep the local part.

    DTensor's own random ops depend on the world size on the CPU, and a GPU's generator differs from the CPU's.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.draws = seed, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_draw = torch.Tag.nondeterministic_seeded in func.tags and func._schema.name.endswith("_")
        if not is_draw:
            return super().__torch_dispatch__(func, types, args, kwargs)
        target = args[0]
        self.written.add(target)
        generator = torch.Generator().manual_seed(name_key(f"{self.seed}/{self.draws}") >> 1)
        self.draws += 1
        whole = torch.empty(target.shape, dtype=torch.float32)
        func(whole, *args[1:], **((kwargs or {}) | {"generator": generator}))
        local = local_tensor(target)
        if local.is_contiguous():
            layout_of(target, "a randomly initialised tensor").copy_from_whole(local, whole)
        else:
            local.copy_(whole)
        return target


@torch.no_grad()
def initialise(model: nn.Module, device: torch.device, seed: int, weights: str | None = None) -> None:
    """Give `model` (from `meta_model`, sharded or not) storage on `device` and its first weights, in place.

    Args:
        seed: of the random weights; the same seed gives the same weights on every engine and world size.
        weights: a folder whose safetensors files are loaded instead (each rank keeps only its own elements).

    Raises:
        InputError: the folder lacks a parameter or persistent buffer of the model, or holds one of another shape; or
            the model type does not say how one of its parameters is initialised.
    """
    give_storage(model, device)
    if files := weight_files(weights):
        load_weights(model, read_safetensors(files), files[0].parent, "model.path: ")
        return
    draws = _DrawWhole(seed)
    # transformers takes a class that FSDP2 has renamed for custom code, and then skips modules without parameters
    # of their own (GPT-2's residual scaling is in one of those). Older ones do not ask.
    own = mock.patch.object(model, "is_custom_code", create=True, return_value=False)
    with own, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with draws:
            cast("PreTrainedModel", model).initialize_weights()
    constructed = cast(dict[str, Tensor], model._constructed)
    for name, param in named_parameters(model):
        if param in draws.written:
            continue
        if name not in constructed:
            raise InputError(
                f"model.model_type: transformers does not say how {name} of {type(model).__name__} is initialised; "
                f"give model.path, a folder with first weights"
            )
        layout_of(param, name).copy_from_whole(local_tensor(param), constructed[name])


def read_safetensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, by name, one after the other."""
    for file in files:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  it is a file, which cannot be iterated
                yield name, f.get_tensor(name)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], source: Path, key: str = "") -> None:
    """Fill the parameters and persistent buffers of `model` by name, each rank its own elements, in place.

    Args:
        model: with storage.
        weights: whole; what the model does not have is left out.
        source, key: where they come from and what names it, for messages.

    Raises:
        InputError: one that the model has is missing, or has another shape.
    """
    wanted: dict[str, Tensor] = dict([*named_parameters(model), *persistent_buffers(model)])
    for name, value in weights:
        if (param := wanted.pop(name, None)) is None:
            continue
        if value.shape != param.shape:
            shapes = f"of shape {list(value.shape)}, the model's is {list(param.shape)}"
            raise InputError(f"{key}{source} holds {name} {shapes}")
        layout_of(param, name).copy_from_whole(local_tensor(param), value)
    if wanted:
        raise InputError(f"{key}no weights for {few(wanted)} in {source}")
