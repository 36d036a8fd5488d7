"""What a request may choose of its attention, and where the turns of a chat begin."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.engine_args import create
from vllm_longctx import BOOKLM
from vllm_longctx.config import LongContextError, RequestOptions
from vllm_longctx.serving.attention_options import check_attention, header_of_user, turns_of_prompt
from vllm_longctx.settings import Settings, active_settings

TRAINED = 512
ENGINES: dict[str, dict[str, Any]] = {
    "lambda": {"attention": {"n_global": 10, "n_local": 256, "max_n_global": 100}},
    "memory": {"attention": {"method": "focused", "mem_layers": [2]}},
    "blocks": {"attention": {"method": "focused", "mem_layers": [2], "lookup": "blocks", "top_k": 64}},
    "top-k": {"attention": {"top_k": 5}},
    "temp-lora": {"preset": "temp-lora-quality"},
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[str, Settings]:
    return request.param, active_settings(create(BOOKLM, {"longctx": ENGINES[request.param]}))


@pytest.mark.parametrize(
    ("options", "takes", "why"),
    [
        ({"attention": "plain"}, {"lambda", "memory", "blocks", "temp-lora"}, "attention does not go with"),
        ({"n_global": 100}, {"lambda"}, "n_global (has no effect|does not go) with"),
        ({"n_global": 101}, set(), "n_global (= 101 is beyond .* at most 100|has no effect|does not go)"),
        ({"drop": "turns"}, {"lambda"}, "drop (has no effect|does not go) with"),
        (
            {"lookup": "blocks", "top_k": 128},
            {"blocks"},
            "lookup (= 'blocks' needs summ|has no eff|does not)",
        ),
        ({"lookup": "top_k", "top_k": 9}, {"memory", "blocks"}, "lookup (has no effect|does not go)"),
        ({"lookup": "top_k"}, {"blocks"}, "lookup (= 'top_k' needs top_k|has no effect|does not go)"),
        ({"top_k": 9}, {"blocks"}, "top_k (= 9 needs lookup|has no effect|does not go)"),
        ({"lookup": "all"}, {"memory", "blocks"}, "lookup (has no effect|does not go)"),
    ],
)
def test_an_engine_takes_what_it_can_meet(
    engine: tuple[str, Settings], options: dict[str, Any], takes: set[str], why: str
) -> None:
    name, settings = engine
    parsed = RequestOptions.parse(options)
    if name in takes:
        check_attention(parsed, settings, TRAINED)
        return
    with pytest.raises(LongContextError, match=f"^{why}"):
        check_attention(parsed, settings, TRAINED)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": "plain", "n_global": 3}, "n_global has no effect beside attention = 'plain'"),
        ({"lookup": "all", "top_k": 3}, "top_k = 3 has no effect with lookup all"),
        ({"drop": "turn"}, "longctx.drop = 'turn'"),
        ({"n_globl": 3}, "did you mean 'n_global'"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], why: str) -> None:
    with pytest.raises(LongContextError, match=why):
        RequestOptions.parse(options)


CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\\n\\n' }}"
    "{{ m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
TOKENS = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "[INST]", "[/INST]"]
NO_TOKENS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BOOKLM)
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "header"),
    [(CHATML, "<|im_start|>user"), (LLAMA3, "<|header|>user<|/header|>"), (MISTRAL, "[INST]")],
)
def test_turns_begin_where_the_template_begins_messages(tokenizer: Any, template: str, header: str) -> None:
    ids = header_of_user(tokenizer, template)
    assert tokenizer.decode(ids) == header
    talk = [
        {"role": "user", "content": "\n Who?"},
        {"role": "assistant", "content": "Ishmael."},
        {"role": "user", "content": "Where is user?"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, chat_template=template)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    renderer = type(
        "Renderer", (), {"get_tokenizer": lambda _: tokenizer, "longctx_chat_template": template}
    )()
    settings = active_settings(create(BOOKLM, {"longctx": ENGINES["lambda"]}))
    turns = turns_of_prompt(prompt, renderer, settings)
    assert len(turns) == 2
    assert tokenizer.decode(prompt[: turns[0]]) == text[: text.index(header)]
    assert tokenizer.decode(prompt[turns[1] :]).startswith(header)
    few = active_settings(create(BOOKLM, {"longctx": {"attention": {"n_global": 0}}}))
    if turns[0]:
        with pytest.raises(
            LongContextError, match=f"system prompt has {turns[0]} tokens, .* at most 0 in front"
        ):
            turns_of_prompt(prompt, renderer, few)
    with pytest.raises(LongContextError, match="no message of the user's"):
        turns_of_prompt(prompt[turns[1] + 1 :], renderer, settings)


@pytest.mark.parametrize("template", [NO_TOKENS, None, "{{ raise_exception('no chats') }}"])
def test_a_template_without_a_token_for_messages_is_refused(tokenizer: Any, template: str | None) -> None:
    with pytest.raises(LongContextError, match="drop = 'turns'"):
        header_of_user(tokenizer, template)
