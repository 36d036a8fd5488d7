"""What a request may choose of what its queries see, and where the turns of its chat begin.

The engine reads the same options again (`Settings.view_of`, `Settings.lookup_of`) and trusts these checks.
"""

import functools
import itertools
from typing import Any

from vllm.platforms import current_platform

from vllm_longctx.config import LongContextError, RequestOptions
from vllm_longctx.modes import Role
from vllm_longctx.settings import Settings

# Beside the options in `SamplingParams.extra_args`, from the front end to the scheduler: where turns begin.
TURNS = "longctx_turns"
CHAT_TEMPLATE = (
    "longctx_chat_template"  # an attribute of vLLM's renderer: the template that the server was given
)


def check_attention(options: RequestOptions, settings: Settings, trained_length: int) -> None:
    """Raises LongContextError for an option that the engine cannot meet: its name comes first."""
    mode, given = settings.mode, options.of_attention
    if not given:
        return
    name = next(iter(given))
    if Role.KEPT in mode.layers:
        raise LongContextError(
            f"{name} does not go with attention.top_k of this engine, whose keys are un-rotated in place; "
            "leave it out"
        )
    of_windows = [name for name in ("n_global", "drop") if name in given]
    if of_windows and not mode.slides:
        raise LongContextError(
            f"{of_windows[0]} has no effect with {mode.asked_for} of this engine; leave it out, or ask a "
            "server with attention.method lm_infinite or streaming"
        )
    of_lookups = [name for name in ("lookup", "top_k") if name in given]
    if of_lookups and Role.MEMORY not in mode.layers:
        raise LongContextError(
            f"{of_lookups[0]} has no effect with {mode.asked_for} of this engine; leave it out, or ask a "
            "server with attention.method focused"
        )
    most = settings.attention.max_n_global
    if options.n_global is not None and most is not None and options.n_global > most:
        raise LongContextError(
            f"n_global = {options.n_global} is beyond this server's limit; give at most {most} "
            "(attention.max_n_global)"
        )
    if Role.MEMORY in mode.layers:
        _check_lookup(options, settings)
    if current_platform.is_cuda() and _differs(options, settings, trained_length):
        raise LongContextError(
            f"{name}: kernels for GPUs take one attention for all requests of an engine; leave it out, or "
            "start the engine with it"
        )


def _check_lookup(options: RequestOptions, settings: Settings) -> None:
    own, asked = settings.attention, options.lookup
    if asked == "blocks" and own.lookup != "blocks":
        raise LongContextError(
            f"lookup = 'blocks' needs summaries of blocks, and this engine keeps none (attention.lookup = "
            f"{own.lookup!r}); leave it out, or start the engine with attention.lookup blocks"
        )
    if asked in ("top_k", "blocks") and options.top_k is None and own.top_k is None:
        raise LongContextError(f"lookup = {asked!r} needs top_k; give it, too")
    if options.top_k is not None and asked is None and own.lookup == "all":
        raise LongContextError(
            f"top_k = {options.top_k} needs lookup top_k: queries of this engine see all of a memory; give "
            "lookup, too"
        )


def _differs(options: RequestOptions, settings: Settings, trained_length: int) -> bool:
    if options.drop is not None or settings.view_of(options, trained_length) is not None:
        return True
    return Role.MEMORY in settings.mode.layers and settings.lookup_of(options) != settings.memory.lookup


def turns_of_prompt(prompt: list[int], renderer: Any, settings: Settings) -> list[int]:
    """Where messages of the user's begin in a chat. prompt: Token ids. renderer: vLLM's.

    Raises LongContextError where none does, or the system prompt before them cannot stay in front.
    """
    header = _header_of(renderer.get_tokenizer(), getattr(renderer, CHAT_TEMPLATE, None))
    ids = list(header)
    starts = (place for place, token in enumerate(prompt) if token == ids[0])
    turns = [place for place in starts if prompt[place : place + len(ids)] == ids]
    if not turns:
        raise LongContextError(
            "drop = 'turns': the prompt has no message of the user's, as the chat template begins it; send a "
            "chat, or leave drop out"
        )
    most = settings.attention.max_n_global or 0
    if turns[0] > most:
        raise LongContextError(
            f"drop = 'turns': the system prompt has {turns[0]} tokens, and this server keeps at most {most} "
            "in front (attention.max_n_global); shorten it, or leave drop out"
        )
    return turns


@functools.lru_cache(maxsize=8)
def _header_of(tokenizer: Any, chat_template: str | None) -> tuple[int, ...]:
    return header_of_user(tokenizer, chat_template)


def header_of_user(tokenizer: Any, chat_template: str | None) -> tuple[int, ...]:
    """Ids of the tokens with which a chat template begins each message of the user's.

    Found by rendering a chat: what stands before the first message of the user's and before a later one, from
    the token on with which messages begin.

    Raises LongContextError where a message does not begin with a token of the template's own.
    """

    def rendered(*contents: str, **kwargs: Any) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template, **kwargs)
        )

    contents = ("5f3a", "9b1c", "7d2e")
    try:
        chat, asked = rendered(*contents), rendered(contents[0])
        begun = rendered(contents[0], add_generation_prompt=True)
        first, later = chat.split(contents[0])[0], chat.split(contents[1])[1].split(contents[2])[0]
    except Exception as e:  # of jinja, of the template itself, or of a tokenizer without any
        raise LongContextError(f"drop = 'turns' needs a chat template, and this model's fails: {e}") from None
    # Without the white space before a message, of which the message's own may become a part.
    ids, others = (tokenizer.encode(text.rstrip(), add_special_tokens=False) for text in (first, later))
    pairs = zip(reversed(ids), reversed(others), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    ids = ids[len(ids) - common :]
    answer = tokenizer.encode(begun.removeprefix(asked), add_special_tokens=False)
    if answer and answer[0] in ids:  # messages begin alike; before that, the one before ends
        ids = ids[len(ids) - 1 - ids[::-1].index(answer[0]) :]
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise LongContextError(
            "drop = 'turns': this model's chat template does not begin messages with a token of its own; "
            "leave drop out"
        )
    return tuple(ids)
