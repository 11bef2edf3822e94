"""examples/server.py under load: many clients and adapters at once, some clients killed, adapters coming and going."""

import asyncio
import importlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from scripts import EXAMPLES
from tiny_models import llama
from torch import nn

import c3a_triton
from c3a_triton import C3AConfig

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!"
NAMES = [f"customer{i}" for i in range(8)]
NEW_TOKENS = 12
LONGEST = 128  # tokens of the model's context
PROMPTS = ["hello", "hello, hello, hello, hello again", "who is there?", "a"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}{{ message['content'] }}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each letter, so that text tells tokens."""
    vocabulary = {"<pad>": 0} | {letter: i for i, letter in enumerate(LETTERS, 1)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", chat_template=TEMPLATE)


def base() -> nn.Module:
    """Weights of a size with which every letter of a prompt makes a difference."""
    sizes = {"vocab_size": len(LETTERS) + 1, "max_position_embeddings": LONGEST, "initializer_range": 0.3}
    return llama(**sizes, eos_token_id=None, bos_token_id=None).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the model, of its adapters, and of "changed": other values for customer0."""
    root = tmp_path_factory.mktemp("served")
    model = base()
    model.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    found = {"base": root / "base"}
    for i, name in enumerate([*NAMES, "changed"]):
        adapted = c3a_triton.apply(base(), C3AConfig(block_size=(4, 6)[i % 2], target_modules="all-linear"))
        torch.manual_seed(i + 1)
        for _, layer in adapted.c3a.layers():
            nn.init.normal_(layer.c3a_kernel["default"], std=3.0)
        adapted.c3a.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Callable[[str, str], str]:
    """What a prompt gets with an adapter, or the base, when nothing else is computed."""
    model, letters = base(), tokenizer()
    for name in [*NAMES, "changed"]:
        c3a_triton.load_adapter(model, folders[name], name)
    known: dict[tuple[str, str], str] = {}

    @torch.no_grad()
    def answer(name: str, prompt: str) -> str:
        if (name, prompt) not in known:
            ids = torch.tensor([letters(prompt)["input_ids"]])
            with model.c3a.using(["__base__" if name == str(folders["base"]) else name]):
                made = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
            known[name, prompt] = letters.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return known[name, prompt]

    return answer


class Running:
    """The example in a thread of this process, so that tests see what it holds."""

    def __init__(self, folders: dict[str, Path], names: list[str]) -> None:
        module = importlib.import_module("server")
        models = module.ModelManager(device="cpu", continuous_batching=True, force_model=str(folders["base"]))
        batches = module.ContinuousBatchingConfig(
            num_blocks=64, page_size=16, max_batch_tokens=96, per_request_processors=True
        )
        self.base = str(folders["base"])
        self.served = module.Served(models, batches)
        for name in names:
            self.served.load(name, str(folders[name]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = uvicorn.Config(module.application(models, self.served), port=self.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Running":
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def complete(self, name: str, prompt: str = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", request(name, prompt) | fields)

    def holds_nothing(self) -> bool:
        """Whether no request has anything: no place in the scheduler, no block of the cache, no handler."""
        batching = self.served.batching
        scheduler, cache = batching.batch_processor.scheduler, batching.batch_processor.cache
        tables = [allocator.block_table for allocator in cache.cache_allocators.values()]
        return not (
            scheduler.active_requests
            or scheduler.waiting_requests
            or any(tables)
            or batching.output_router.result_handlers
            or batching.names_in_use()
        )


def until(done: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that is sure to come."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running(folders: dict[str, Path]) -> Iterator[Running]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        with Running(folders, NAMES) as server:
            yield server
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _left_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: every request has ended, and nothing is held for any."""
    yield
    if "running" in request.fixturenames:
        until(request.getfixturevalue("running").holds_nothing)


def request(name: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0} | fields


async def text_of(client: httpx.AsyncClient, name: str, prompt: str, stream: bool) -> str:
    """A completion's text, asked for as one answer or as a stream."""
    body = request(name, prompt, stream=stream)
    if not stream:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (name, NEW_TOKENS)
        return answer["choices"][0]["text"]
    events = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            events += [line.removeprefix("data: ")] if line else []
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["text"] for choice in choices)


async def killed(port: int, body: dict[str, Any], seconds: float) -> None:
    """A client whose connection is reset so long after it has sent its request."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
    await writer.drain()
    await asyncio.sleep(seconds)
    writer.transport.abort()


def test_64_clients_over_8_adapters(running: Running, alone: Callable[[str, str], str]) -> None:
    """Each gets what its request gets alone, whatever else is computed, fails, or is killed beside it."""
    chance = random.Random(0)
    names = [*NAMES, running.base]
    # Whole answers and streams; adapter and prompt differ from client to client, and from one request to the next.
    asked = [
        [(names[(client + turn) % 9], PROMPTS[(client // 9 + turn) % 4], (client + turn) % 2 == 0) for turn in range(2)]
        for client in range(64)
    ]
    long = request("", "hello", max_tokens=LONGEST - 5)

    async def client(http: httpx.AsyncClient, requests: list[tuple[str, str, bool]]) -> list[str]:
        return [await text_of(http, *request) for request in requests]

    async def all_of_them() -> tuple[list[list[str]], list[httpx.Response]]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as http:
            clients = [asyncio.ensure_future(client(http, requests)) for requests in asked]
            kills = [
                killed(running.port, long | {"model": name, "stream": stream}, chance.uniform(0, 0.5))
                for name in NAMES
                for stream in (False, True)
            ]
            unknown = [http.post("/v1/completions", json=request(f"nobody{i}", "hello")) for i in range(4)]
            await asyncio.gather(*kills)
            return await asyncio.gather(*clients), await asyncio.gather(*unknown)

    texts, refusals = asyncio.run(all_of_them())
    assert texts == [[alone(name, prompt) for name, prompt, _ in requests] for requests in asked]
    assert len({text for answers in texts for text in answers}) > 30  # adapters and prompts make a difference
    assert [refusal.status_code for refusal in refusals] == [404] * 4
    until(running.holds_nothing)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_killed_client_frees_its_slot(running: Running, stream: bool) -> None:
    scheduler = running.served.batching.batch_processor.scheduler

    async def begun_and_killed() -> None:
        client = asyncio.ensure_future(
            killed(running.port, request("customer1", "hello", stream=stream, max_tokens=LONGEST), 0.2)
        )
        while not scheduler.active_requests:
            await asyncio.sleep(0.001)
        assert running.served.batching.names_in_use() == {"customer1"}
        await client

    with slowed(running.served.model, 0.02) as steps:
        asyncio.run(begun_and_killed())
        until(running.holds_nothing)
    assert len(steps) < 100  # it asked for 123


@contextmanager
def slowed(model: nn.Module, seconds: float) -> Iterator[list[None]]:
    """Within it each step of a model takes so much longer, as a larger one's do; the list has an entry for each."""
    steps: list[None] = []

    def wait(*_: object) -> None:
        steps.append(time.sleep(seconds))

    hook = model.register_forward_pre_hook(wait)
    try:
        yield steps
    finally:
        hook.remove()


def test_adapters_come_change_and_go(
    running: Running, folders: dict[str, Path], alone: Callable[[str, str], str]
) -> None:
    def listed() -> list[str]:
        return [card["id"] for card in httpx.get(f"{running.url}/v1/models").json()["data"]]

    def text(answer: httpx.Response) -> str:
        return answer.raise_for_status().json()["choices"][0]["text"]

    assert listed() == [running.base, *NAMES]
    load = {"lora_name": "new", "lora_path": str(folders["customer0"])}
    assert running.complete("new").status_code == 404

    # Loaded while others are in flight.
    with slowed(running.served.model, 0.02):
        others = [Streaming(running, name) for name in NAMES[:3]]
        assert running.post("/v1/load_lora_adapter", load).status_code == 200
        assert listed() == [running.base, *NAMES, "new"]
        assert text(running.complete("new")) == alone("customer0", "hello")
        again = running.post("/v1/load_lora_adapter", load)
        assert (again.status_code, again.json()["error"]["type"]) == (409, "ConflictError")
        assert [other.text() for other in others] == [alone(name, "hello") for name in NAMES[:3]]

        # Exchanged while a request has it: that one goes on with the former values, the next has the others.
        former = Streaming(running, "new")
        changed = load | {"lora_path": str(folders["changed"]), "load_inplace": True}
        assert running.post("/v1/load_lora_adapter", changed).status_code == 200
        assert text(running.complete("new")) == alone("changed", "hello")
        assert former.text() == alone("customer0", "hello") != alone("changed", "hello")

        # Not unloaded while a request has it.
        user = Streaming(running, "new")
        refused = running.post("/v1/unload_lora_adapter", {"lora_name": "new"})
        assert (refused.status_code, "new" in refused.json()["error"]["message"]) == (409, True)
        assert user.text() == alone("changed", "hello")
    until(running.holds_nothing)
    assert running.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert listed() == [running.base, *NAMES]
    assert running.complete("new").status_code == 404
    assert running.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 404


def test_an_adapter_that_cannot_be_served_is_not_loaded(running: Running, tmp_path: Path) -> None:
    config = C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    c3a_triton.apply(base(), config).c3a.save_pretrained(tmp_path)
    refused = running.post("/v1/load_lora_adapter", {"lora_name": "whole", "lora_path": str(tmp_path)})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "BadRequestError")
    assert "modules_to_save" in refused.json()["error"]["message"]
    assert running.complete("whole").status_code == 404
    assert "whole" not in running.served.model.c3a.adapters


class Streaming:
    """A request in flight: its first token has come, the others will."""

    def __init__(self, running: Running, name: str) -> None:
        self._context = httpx.stream(
            "POST", f"{running.url}/v1/completions", json=request(name, "hello", stream=True), timeout=60
        )
        self._lines = self._context.__enter__().iter_lines()
        self._first = next(self._lines)

    def text(self) -> str:
        lines = [self._first, *self._lines]
        self._context.__exit__(None, None, None)
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_openais_own_client(running: Running, alone: Callable[[str, str], str]) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [running.base, *NAMES]
    fields: dict[str, Any] = {"model": "customer2", "max_tokens": NEW_TOKENS, "temperature": 0}
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(messages=messages, **fields)
    assert whole.choices[0].message.content == alone("customer2", "hello")
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone("customer2", "hello")
    with pytest.raises(openai.NotFoundError, match=r"'nobody' does not exist, but these do: .*customer7"):
        client.chat.completions.create(messages=messages, model="nobody")
    with pytest.raises(openai.BadRequestError, match="stop"):
        client.completions.create(prompt="hello", stop=["."], **fields)


def test_each_request_has_its_own_sampling(running: Running, alone: Callable[[str, str], str]) -> None:
    async def asked() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as http:
            sampled = [request("customer3", "hello", temperature=1.5, top_p=0.9 + i / 200) for i in range(20)]
            greedy = [request("customer3", "hello") for _ in range(4)]
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for body in [*greedy, *sampled]))

    texts = [answer.raise_for_status().json()["choices"][0]["text"] for answer in asyncio.run(asked())]
    assert texts[:4] == [alone("customer3", "hello")] * 4
    assert len(set(texts[4:])) > 10


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "warm"),
        ({"temperature": None, "top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": ""}, "no prompt"),
        ({"prompt": ["a", "b"]}, "prompt must be a string"),
        ({"prompt": "a" * LONGEST}, f"the prompt has {LONGEST} tokens, and must have 1 to {LONGEST - 1}"),
        ({"seed": 3}, "seed"),
        ({"n": 2}, "n"),
        ({"top_k": 3}, "top_k"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_requests_fail_alone(
    running: Running, alone: Callable[[str, str], str], fields: dict[str, Any], said: str
) -> None:
    error = running.complete("customer1", **fields)
    assert error.status_code == 400
    assert error.json()["error"]["type"] == "BadRequestError"
    assert said in error.json()["error"]["message"]
    assert running.complete("customer1").json()["choices"][0]["text"] == alone("customer1", "hello")


def test_what_is_no_request(running: Running, tmp_path: Path) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"):
        assert running.post(path, []).json()["error"]["code"] == 400
        assert running.post(path, {}).json()["error"]["code"] == 400
        assert ".py" not in running.post(path, []).json()["error"]["message"]
    nameless = running.post("/v1/completions", {"prompt": "hello"})
    assert (nameless.status_code, "no model" in nameless.json()["error"]["message"]) == (400, True)
    assert httpx.get(f"{running.url}/v1/models/customer1").json()["parent"] == running.base
    assert httpx.get(f"{running.url}/v1/models/customer9").status_code == 404
    for message, said in (({"role": "system", "content": "a"}, "no system here"), ({"content": "a"}, "no 'role'")):
        chat = running.post("/v1/chat/completions", {"model": "customer1", "messages": [message]})
        assert (chat.status_code, said in chat.json()["error"]["message"]) == (400, True)
    empty = {"lora_name": "empty", "lora_path": str(tmp_path)}
    assert str(tmp_path) in running.post("/v1/load_lora_adapter", empty).json()["error"]["message"]
    base = empty | {"lora_name": running.base}
    assert running.post("/v1/load_lora_adapter", base).status_code == 409


def test_what_says_nothing_is_taken(running: Running, alone: Callable[[str, str], str]) -> None:
    fields = {"n": 1, "stop": None, "user": "me", "frequency_penalty": 0, "stream_options": None}
    assert running.complete("customer1", **fields).json()["choices"][0]["text"] == alone("customer1", "hello")


def test_the_context_ends_an_answer(running: Running) -> None:
    answer = running.complete("customer1", max_tokens=10 * LONGEST).json()
    assert answer["usage"]["total_tokens"] == LONGEST
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_error_in_a_step_reaches_its_clients(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON, whatever the error says, in the stream that had begun; then nothing is taken any more."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with Running(folders, NAMES[:1]) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200

        def fail(*_: object) -> None:
            raise RuntimeError('no "memory"\nleft')

        server.served.model.register_forward_pre_hook(fail)
        lines = server.complete("customer0", stream=True).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["message"] == 'no "memory"\nleft'
        assert lines[-2] == "data: [DONE]"
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert server.complete("customer0").status_code == 503


def test_text_that_cannot_be_made_fails_alone(
    running: Running, alone: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be told to one client is told it; the outputs of the same step reach the others."""
    streamer = sys.modules["server"].CBStreamer
    put = streamer.put

    def fail(self: Any, output: Any) -> None:
        if len(output.prompt_ids) == 1 and len(output.generated_tokens) == 3:
            raise ValueError('no "text"')
        put(self, output)

    monkeypatch.setattr(streamer, "put", fail)

    async def asked() -> list[Any]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as http:
            others = [text_of(http, name, "hello", stream=bool(i % 2)) for i, name in enumerate(NAMES)]
            return await asyncio.gather(*others, http.post("/v1/completions", json=request(NAMES[0], "a", stream=True)))

    *texts, failed = asyncio.run(asked())
    assert texts == [alone(name, "hello") for name in NAMES]
    assert json.loads(failed.text.split("\n\n")[-3].removeprefix("data: "))["error"]["message"] == 'no "text"'


def test_as_a_command(folders: dict[str, Path], alone: Callable[[str, str], str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "server.py"), str(folders["base"]), "--adapter"]
    failed = subprocess.run([*command, f"x={tmp_path}"], capture_output=True, text=True, timeout=300, check=False)
    assert (failed.returncode, f"error: --adapter x={tmp_path}: " in failed.stderr) == (2, True)
    bounds = ["--device", "cpu", "--cb-num-blocks", "8", "--cb-max-batch-tokens", "64"]
    process = subprocess.Popen([*command, f"mine={folders['customer5']}", "--port", str(port), *bounds])
    try:
        until(lambda: answers(port), 300)
        body = request("mine", "who is there?")
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == alone("customer5", "who is there?")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False
