"""What a user may ask for, and every check of it. Names: README, "Configuration".

A configuration is a plain dict under `additional_config["longctx"]`, so that it reaches every process and enters vLLM's
compile-cache hash. `LongContextConfig.parse` checks it by itself; `for_model` fills in lengths from the model's trained
length and checks them against it.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.config import VllmConfig

from vllm_longctx.geometry import Distances, Geometry

KEY = "longctx"

PRESETS: dict[str, dict[str, Any]] = {
    "lm-infinite": {"attention": {"method": "lm_infinite"}},
    "streaming": {"attention": {"method": "streaming"}},
}
DEFAULT_PRESET = "lm-infinite"
# Papers' choices: LM-Infinite section 4.1 (10 to 100 first tokens), StreamingLLM section 3.2 (4).
DEFAULT_N_GLOBAL = {"lm_infinite": 10, "streaming": 4}

NOT_BUILT = {
    "adaptation": "Temp-LoRA (adaptation)",
    "focused": "Focused Transformer (attention.method focused)",
    "top_k": "the top-k branch (attention.top_k*)",
}


class LongContextError(ValueError):
    """A request of the user's that cannot be met; the message names the field, its value and the remedy."""


def did_you_mean(key: str, known: Iterable[str]) -> str | None:
    """A question that names the known key nearest to an unknown one; None if none is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                hint = did_you_mean(str(key), cls.model_fields) or f"known keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return data


class AttentionSection(_Section):
    """What a query sees. Lengths in tokens; None takes the value from the model's trained length."""

    method: Literal["lm_infinite", "streaming", "focused", "none"] = "lm_infinite"
    n_global: int | None = Field(default=None, ge=0)
    n_local: int | None = Field(default=None, ge=1)
    distance_ceiling: int | None = Field(default=None, ge=1)
    distances: Distances | None = None
    allow_beyond_trained: bool = False
    top_k: int | None = None
    top_k_from_layer: int | None = None
    top_k_to_layer: int | None = None
    top_k_insert_at: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "focused":
            raise ValueError(f"{NOT_BUILT['focused']} is not built yet; use lm_infinite or streaming")
        for name in ("top_k", "top_k_from_layer", "top_k_to_layer", "top_k_insert_at"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} = {getattr(self, name)}: {NOT_BUILT['top_k']} is not built yet; leave it out")
        if self.method == "none":
            given = self.model_fields_set - {"method"}
            if given:
                raise ValueError(f"method none takes no other keys, but {', '.join(sorted(given))} was given")
        if self.method == "streaming" and self.distances == "relative":
            raise ValueError("method streaming counts distances in_cache; for relative distances use lm_infinite")
        if self.in_cache and self.distance_ceiling is not None:
            raise ValueError(f"distance_ceiling = {self.distance_ceiling} has no effect on distances in_cache; leave it out")
        if self.n_global is not None and self.n_local is not None and self.n_global > self.n_local:
            raise ValueError(f"n_global = {self.n_global} is more than n_local = {self.n_local}; lower n_global")
        return self

    @property
    def in_cache(self) -> bool:
        return self.method == "streaming" or self.distances == "in_cache"

    def for_model(self, trained_length: int) -> "AttentionSection":
        """Every length filled in and checked against the model's trained length (tokens)."""
        n_global = DEFAULT_N_GLOBAL[self.method] if self.n_global is None else self.n_global
        room = trained_length - n_global if self.in_cache else trained_length
        n_local = max(room, 1) if self.n_local is None else self.n_local
        ceiling = None if self.in_cache else (self.distance_ceiling or trained_length)
        if n_global > n_local:
            raise LongContextError(
                f"attention.n_global = {n_global} is more than attention.n_local = {n_local}; lower n_global"
            )
        if not self.allow_beyond_trained:
            limit = f"the model was trained on {trained_length} tokens; lower it, or set attention.allow_beyond_trained"
            if self.in_cache and n_global + n_local > trained_length:
                raise LongContextError(f"attention.n_global + attention.n_local = {n_global + n_local}, but {limit}")
            if n_local > trained_length:
                raise LongContextError(f"attention.n_local = {n_local}, but {limit}")
            if ceiling is not None and ceiling > trained_length:
                raise LongContextError(f"attention.distance_ceiling = {ceiling}, but {limit}")
        return self.model_copy(
            update={
                "n_global": n_global,
                "n_local": n_local,
                "distance_ceiling": ceiling,
                "distances": "in_cache" if self.in_cache else "relative",
            }
        )


class ServingSection(_Section):
    """What `vllm serve` does with HTTP requests.

    default_max_tokens: tokens written for a request that sets no limit; vLLM's own default would be all of max_model_len.
    """

    default_max_tokens: int = Field(default=4096, ge=1)


class LongContextConfig(_Section):
    """The value of `additional_config["longctx"]`. Keys given beside a preset override the preset's."""

    preset: str | None = None
    attention: AttentionSection = AttentionSection()
    adaptation: dict[str, Any] | None = None
    serving: ServingSection = ServingSection()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"expected a mapping such as {{'preset': '{DEFAULT_PRESET}'}}, got {data!r}")
        name = data.get("preset")
        if name is None:
            return data
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        own = data.get("attention", {})
        if not isinstance(own, dict):
            return data
        return {**data, "attention": {**PRESETS[name]["attention"], **own}}

    @model_validator(mode="after")
    def _built(self) -> Self:
        if self.adaptation is not None:
            raise ValueError(f"{NOT_BUILT['adaptation']} is not built yet; leave `adaptation` out")
        if not self.changes_attention and "serving" in self.model_fields_set:
            raise ValueError("serving has no effect with attention.method none, which leaves vLLM as it is; leave it out")
        return self

    @classmethod
    def parse(cls, value: Any) -> "LongContextConfig":
        """From a dict or a JSON string. Raises LongContextError naming each bad field, its value and what is allowed."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as e:
                raise LongContextError(f"longctx: not valid JSON ({e.msg} at character {e.pos}): {value}") from None
        try:
            return cls.model_validate(value)
        except ValidationError as e:
            raise LongContextError("; ".join(_describe(error) for error in e.errors())) from None

    def for_model(self, trained_length: int) -> "LongContextConfig":
        """Every length filled in. trained_length: tokens."""
        if not self.changes_attention:
            return self
        return self.model_copy(update={"attention": self.attention.for_model(trained_length)})

    @property
    def changes_attention(self) -> bool:
        return self.attention.method != "none"

    @property
    def geometry(self) -> Geometry:
        """The geometry of a configuration that `for_model` has filled in."""
        a = self.attention
        if a.n_global is None or a.n_local is None or a.distances is None:
            raise RuntimeError("LongContextConfig.for_model has not been called")
        return Geometry(a.n_global, a.n_local, a.distance_ceiling, a.distances)

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, `parse`-able again."""
        return self.model_dump(exclude_none=True)


def checked_json(text: str) -> dict[str, Any]:
    """The value of a `--longctx` flag, as the user wrote it. Raises LongContextError if it is not a configuration."""
    LongContextConfig.parse(text)
    return json.loads(text)


def _describe(error: Any) -> str:
    where = ".".join(["longctx", *(str(part) for part in error["loc"])])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} = {error['input']!r}: {message}"


def active_config(vllm_config: VllmConfig) -> LongContextConfig:
    """The filled-in configuration of an engine that `vllm_longctx.engine_args` has set up."""
    return LongContextConfig.parse(vllm_config.additional_config[KEY])
