"""Addresses of versions: two versions with one address are the same, whoever trained them and when.

h(0) is the address of the untrained adapter: a hash of all that decides training and is not text. h(v) is a
hash of h(v-1) and of what version v was trained on. So texts that begin alike have the same addresses as far
as they are alike, under one recipe.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from msgspec.structs import asdict

from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora.messages import Recipe

BYTES = 32
# Settings that decide what a version is, beside those of the recipe.
DECIDING = frozenset({"method", "block_tokens", "train_context_tokens", "update_mode"})
DECIDING_OF_TRAINER = frozenset({"device", "attention", "threads"})
# Others decide which text is trained on, which is hashed itself, or what is done with versions.
NOT_DECIDING = frozenset(
    {
        "context_tokens",
        "window_tokens",
        "plain_tokens",
        "learn",
        "train_on_prompt",
        "kv_policy",
        "keep_first",
        "on_failure",
        "cache_gib",
        "cache_dir",
        "cache_dir_gib",
        "slots",
        "requests",
        "adapters_root",
        "tenant_header",
        "quota",
        "max_rank",
        "max_epochs",
        "min_block_tokens",
        "trainer",
    }
)
# The dtype in force is in `base_model.identity`.
NOT_DECIDING_OF_TRAINER = frozenset(
    {"dtype", "recompute", "duty_cycle", "cpus", "address", "timeout_s", "start_timeout_s", "max_restarts"}
)


def untrained(
    model: bytes, settings: Adaptation, recipe: Recipe, salt: str | None = None, content: bytes = b""
) -> bytes:
    """h(0) of a request's adapter.

    model: Names the weights, see `base_model.identity`.
    settings, recipe: The request's.
    salt: vLLM's `cache_salt`: requests with different ones share nothing.
    content: Names the weights of the saved adapter that the request starts from. Empty for a new one.
    """
    trainer = settings.trainer
    decides: dict[str, Any] = {
        "model": model.hex(),
        "recipe": asdict(recipe),
        "settings": {name: getattr(settings, name) for name in sorted(DECIDING)},
        "trainer": {name: getattr(trainer, name) for name in sorted(DECIDING_OF_TRAINER)},
        "salt": salt,
        "content": content.hex(),
    }
    return blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=BYTES).digest()


def trained(before: bytes, tokens: Sequence[int], num_targets: int) -> bytes:
    """h(v), from h(v-1) and the example of block v.

    tokens: The example, see `blocks.example`.
    num_targets: How many of its last tokens are targets.
    """
    numbers = np.array([num_targets, *tokens], dtype="<i8")
    return blake2b(before + numbers.tobytes(), digest_size=BYTES).digest()
