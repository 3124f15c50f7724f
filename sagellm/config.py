"""An engine's settings, and the KV cache that follows from them. A leaf; every value is validated here, at the edge.

Settings come from keyword arguments, environment variables, a file and the defaults, in this order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_type_hints

from attrs import Attribute, asdict, evolve, field, fields_dict, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.documents import parse_yaml, read, unknown_key
from sagellm.errors import UserError, unknown
from sagellm.schemas import DTYPE_BYTES, FLOATS, KV_SCALES, KVCacheSchema, full_name
from sagellm.target import CapabilityDescriptor
from sagellm.topology import TOPOLOGIES, find

AUTO = "auto"
ENVIRONMENT = "SAGELLM_"


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _topology(instance: object, attribute: Attribute, value: Any) -> None:
    checks.text(instance, attribute, value)
    checks.one_of((AUTO, *TOPOLOGIES))(instance, attribute, value.partition("@")[0])
    if value != AUTO:
        find(value)


@frozen(kw_only=True)
class EngineConfig:
    """All settings of one engine."""

    model: str = field(default="builtin", converter=_path_text, validator=checks.text)
    """A folder, a name on the Hugging Face hub, or `builtin`."""
    draft_model: str | None = field(default=None, converter=_path_text, validator=optional(checks.text))
    """A smaller model of the same vocabulary that guesses tokens ahead, given as `model` is; None: only text does."""
    target: str = field(default=AUTO, validator=checks.text)
    """Backend to compile for; auto takes the best of this machine."""
    dtype: str = field(default=AUTO, converter=full_name, validator=checks.one_of((AUTO, *FLOATS)))
    """Type of weights and activations, also as fp32, bf16, fp16; auto takes the checkpoint's."""
    kv_dtype: str = field(default=AUTO, converter=full_name, validator=checks.one_of((AUTO, *DTYPE_BYTES)))
    """Type of keys and values, also as fp32, bf16, fp16, fp8; auto takes that of the activations."""
    pipeline: str | None = field(default=None, validator=optional(checks.instance_of(str, "a text")))
    """Passes as text, as name,name{option=value}; empty is none, None is the default pipeline."""
    tensor_parallel: int = field(default=1, validator=checks.whole())
    """Ranks, each a process, that the model is divided among."""
    topology: str = field(default=AUTO, validator=_topology)
    """How the ranks' devices are joined, for predictions; auto is as the backend has it, hccs@50 sets GB/s a link."""
    block_size: int | None = field(default=None, validator=optional(checks.whole()))
    """Tokens per KV block; None takes what the backend prefers."""
    max_sequences: int = field(default=64, validator=checks.whole())
    """Sequences that run at the same time."""
    max_batched_tokens: int = field(default=2048, validator=checks.whole())
    """Tokens forwarded in one step; longer prompts are cut into chunks. Sequences that decode always take part."""
    max_length: int | None = field(default=None, validator=optional(checks.whole()))
    """Tokens of a sequence, prompt and output; None takes the model's."""
    order: str = field(default="fcfs", validator=checks.one_of(("fcfs", "priority", "deadline")))
    """Which waiting sequence runs next: first come first served, highest priority, or earliest deadline."""
    max_queue: int = field(default=1024, validator=checks.whole())
    """Sequences that may wait; more are refused."""
    kv_memory_fraction: float = field(default=0.3, validator=checks.number(above=0, high=1))
    """Part of the free memory that the KV cache may take."""
    host_kv_gib: float = field(default=0.0, validator=checks.number(0))
    """GiB of host memory for KV blocks that leave the device; 0 computes them again instead."""
    prefix_caching: bool = field(default=True, validator=checks.flag)
    """Keep the KV blocks of finished sequences for prompts that begin alike."""
    enforce_eager: bool = field(default=False, validator=checks.flag)
    """Launch every step call by call, without captured graphs, where the backend has some."""
    core: str = field(default="inline", validator=checks.one_of(("inline", "process")))
    """Where the engine's core runs: inline in the caller's process, or in a process of its own."""
    max_restarts: int = field(default=3, validator=checks.whole(0))
    """Times in a row that a core which died is started again without having produced a token."""
    seed: int = field(default=0, validator=checks.whole(0))
    """Where requests without a seed get theirs: the same requests in the same order draw the same tokens."""
    record: Path | None = field(
        default=None, converter=_path, validator=optional(checks.instance_of(Path, "a folder"))
    )
    """Folder where every step is written, to be run again by `sagellm replay`; None writes nothing."""
    explain_steps: int = field(default=0, validator=checks.whole(0))
    """Last steps that are kept to be explained by `/debug`, with what their requests found in the cache; costs time."""
    check_passes: int = field(default=0, validator=checks.whole(0))
    """Evaluate one step in so many before and after each pass by the operations' meaning, and report what differs; 0
    checks none. It is slow: the reference is plain torch, an operation at a time."""
    verify: str = field(default="weak", validator=checks.one_of(("off", "weak", "full")))
    """Checks on a graph that is compiled: off, weak or full."""

    @classmethod
    def load(
        cls, source: str | Path | Mapping[str, Any] | None, env: Mapping[str, str], **overrides: Any
    ) -> Self:
        """Settings of all sources: `overrides`, else `SAGELLM_<FIELD>` in `env`, else `source`, else the default.

        `source` is a .yaml, .yml or .json file, or what one would hold. A text of the environment is read as YAML
        reads it where the field is no text. Variables that name no field belong to others and are ignored.
        Raises `UserError`, one line that names the file, variable or setting.
        """
        where = "config" if source is None or isinstance(source, Mapping) else str(source)
        given = read(source) if isinstance(source, (str, Path)) else source
        values = cls._settings({} if given is None else given, where)
        for name in fields_dict(cls):
            if (variable := f"{ENVIRONMENT}{name.upper()}") in env:
                value = _from_text(name, env[variable], variable)
                values |= cls._settings({name: value}, variable)
        check_settings(overrides)
        return cls(**values | overrides)

    @classmethod
    def _settings(cls, given: Any, where: str) -> dict[str, Any]:
        """These settings, if they are some; errors name where they come from."""
        if not isinstance(given, Mapping):
            raise UserError(f"{where} holds {given!r}; accepted: a mapping of settings")
        check_settings(given, f"setting in {where}")
        try:
            cls(**given)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return dict(given)

    def changed(self, **settings: Any) -> Self:
        """A copy with other settings."""
        check_settings(settings)
        return evolve(self, **settings)


def check_settings(names: Mapping[Any, Any], what: str = "setting") -> None:
    """That these are fields of `EngineConfig`."""
    known = fields_dict(EngineConfig)
    for name in names:
        if name not in known:
            raise unknown_key(what, name, known)


def _from_text(name: str, text: str, variable: str) -> Any:
    """An environment's text as a value of this field: as it is for texts and paths, else a scalar of YAML."""
    kind = get_type_hints(EngineConfig)[name]
    if kind in (str, str | None, Path | None):
        return text
    value = parse_yaml(text, variable)
    if kind is bool and value in (0, 1):
        return bool(value)
    return value


AskedKV = str | Mapping[str, Any] | KVCacheSchema | None
"""A dtype or auto, some fields, a document (a mapping that has `schema`), a schema, or None: what the settings say."""


def resolve_kv_schema(
    asked: AskedKV, capability: CapabilityDescriptor, default: KVCacheSchema, activations: str
) -> KVCacheSchema:
    """The KV cache that is asked for, if this backend and this model can have it.

    `default` follows from the model and the settings; `activations` is the dtype that is computed in, which auto
    means. Only dtype and block size are free: the scales follow from the dtype, and the other fields must be the
    default's. Raises `UserError`.
    """
    wanted = _asked(asked, default, activations)
    for name, value in asdict(wanted).items():
        fixed = getattr(default, name)
        if name not in ("dtype", "scale_dtype", "block_size") and value != fixed:
            raise UserError(f"{name} of the KV cache is {value!r}; accepted: {fixed!r}, as the model has it")
    backend = capability.backend
    if not capability.any_block_size and wanted.block_size not in capability.block_sizes:
        sizes = ", ".join(map(str, capability.block_sizes))
        raise UserError(f"block_size is {wanted.block_size} for {backend}; accepted: {sizes}")
    if wanted.dtype not in capability.kv_dtypes:
        raise UserError(
            f"kv dtype {wanted.dtype!r} for {backend}; accepted: {', '.join(capability.kv_dtypes)}"
            f"{_what_it_has_instead(wanted.dtype, capability)}"
        )
    if wanted.scale_dtype != KV_SCALES.get(wanted.dtype):
        raise UserError(
            f"scale_dtype of the KV cache is {wanted.scale_dtype!r} with dtype {wanted.dtype!r}; "
            f"accepted: {KV_SCALES.get(wanted.dtype)!r}"
        )
    if wanted.dtype in FLOATS and wanted.dtype != activations and not capability.mixed_kv:
        raise UserError(
            f"kv dtype {wanted.dtype!r} with activations of dtype {activations!r} for {backend}; accepted: "
            f"{activations} (its kernels read no KV of another dtype), or another dtype for both"
        )
    return wanted


def _asked(asked: Any, default: KVCacheSchema, activations: str) -> KVCacheSchema:
    """`default`, with what is asked for put over it."""
    if asked is None or isinstance(asked, KVCacheSchema):
        return asked or default
    if isinstance(asked, Mapping) and "schema" in asked:
        return KVCacheSchema.from_dict(asked)
    if isinstance(asked, str):
        asked = {"dtype": asked}
    if not isinstance(asked, Mapping):
        raise UserError(f"KV schema is {asked!r}; accepted: a dtype, a mapping of fields or a KVCacheSchema")
    known = fields_dict(KVCacheSchema)
    for key in asked:
        if key not in known:
            raise unknown_key("key in the KV schema", key, known)
    dtype = asked.get("dtype", default.dtype)
    if full_name(dtype) not in (AUTO, *DTYPE_BYTES):
        raise unknown("kv dtype", dtype, (AUTO, *DTYPE_BYTES))
    dtype = activations if dtype == AUTO else full_name(dtype)
    return evolve(default, **{"scale_dtype": KV_SCALES.get(dtype), **asked, "dtype": dtype})


def _what_it_has_instead(dtype: str, capability: CapabilityDescriptor) -> str:
    """For a small type that the backend lacks: say so, and which other small ones it has."""
    family = dtype.partition("_")[0]
    if dtype in FLOATS or any(d.startswith(family) for d in capability.kv_dtypes):
        return ""
    small = [d for d in capability.kv_dtypes if d not in FLOATS]
    return f" (this backend has no {family}{'; it has ' + ', '.join(small) if small else ''})"
