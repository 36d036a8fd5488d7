"""benchmarks/chat.py, against a server of a few lines that speaks as vLLM's does."""

import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import chat
import pytest
from chat import Turn, turn_table, verdict
from rich.console import Console
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
ANSWER = "It is about a fox."


class Handler(BaseHTTPRequestHandler):
    """Answers ANSWER; its histories' tokens are characters, and half of them are cached."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def log_message(self, *args: Any) -> None: ...

    def answer(self, content: str, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def do_GET(self) -> None:
        self.answer(json.dumps({"object": "list", "data": [{"id": "M", "object": "model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.path == "/tokenize":
            self.answer("{}")
        elif self.path == "/v1/completions":
            tokens = body["prompt"]
            logprobs = [None, *({str(token): {"logprob": -2.0}} for token in tokens[1:])]
            self.answer(json.dumps({"choices": [{"prompt_logprobs": logprobs}]}))
        else:
            size = sum(len(message["content"]) for message in body["messages"])
            usage = {
                "prompt_tokens": size,
                "completion_tokens": 6,
                "total_tokens": size + 6,
                "prompt_tokens_details": {"cached_tokens": size // 2},
            }
            chunks = [
                *({"choices": [{"index": 0, "delta": {"content": c}}]} for c in (ANSWER[:5], ANSWER[5:])),
                {"choices": [], "usage": usage},
            ]
            data = [json.dumps({"id": "1", "model": "M", "created": 1, **chunk}) for chunk in chunks]
            self.answer("".join(f"data: {d}\n\n" for d in [*data, "[DONE]"]), "text/event-stream")


@pytest.fixture
def address() -> Iterator[str]:
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_every_turn_sends_the_whole_history(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BOOKLM)
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(chat, "tokenizer_of", lambda model: tokenizer)
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    chat.main("booklm", turns=3, message_tokens=50, url=address, json_out=out, plot_out=figure)
    result = json.loads(out.read_text())
    turns = [Turn(**turn) for turn in result["turns"]]
    assert (result["trained"], [turn.number for turn in turns]) == (512, [1, 2, 3])
    assert all(turn.answer == ANSWER and turn.nll == 2.0 and turn.written == 6 for turn in turns)
    assert all(turn.cached == turn.history // 2 for turn in turns)
    assert all(0 < turn.first_token_s <= turn.turn_s and turn.server_tokenizing_s > 0 for turn in turns)
    chats = [body["messages"] for path, body in Handler.asked if path == "/v1/chat/completions"]
    assert [len(messages) for messages in chats] == [1, 3, 5] and chats[2][:3] == chats[1]
    questions = [message["content"] for message in chats[2] if message["role"] == "user"]
    assert len({*questions}) == 3 and all(question.startswith(chat.REQUEST) for question in questions)
    alone = [body["prompt"] for path, body in Handler.asked if path == "/v1/completions"]
    assert [tokenizer.decode(prompt) for prompt in alone] == [f"{q}\n{ANSWER}" for q in questions]
    assert figure.stat().st_size > 10_000


def turn(number: int, first_token_s: float) -> Turn:
    return Turn(number, 100 * number, 50, 6, first_token_s, 2.0, 0.25, 0.1, math.nan, "")


def test_flatness_is_told_by_medians() -> None:
    turns = [turn(number, 1.0 if number < 100 else 1.5) for number in range(1, 201)]
    turns[-1] = turn(200, 40.0)
    said = verdict(turns, 1000)
    assert (
        "turn 200 (20,000 tokens, 20.0 trained lengths) takes 1.50 times as long as that of turn 20" in said
    )
    assert "Tokenizing is 1% of it" in said and "5.0 ms of CPU time per 1,000 tokens" in said
    console = Console(width=120)
    with console.capture() as shown:
        console.print(turn_table(turns))
    assert shown.get().count("│") == 10 * 8 and "19,980" not in shown.get()


def test_a_model_without_a_chat_template_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(chat.typer.Exit):
        chat.main("booklm", turns=2)
    assert "--model booklm has no chat template" in " ".join(capsys.readouterr().err.split())
