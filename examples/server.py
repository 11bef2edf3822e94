"""An OpenAI-compatible server of one model with many C3A adapters, on what `transformers serve` is made of.

    pip install 'transformers[serving]'
    python examples/server.py MODEL --adapter customer1=FOLDER customer2=FOLDER

`model` in a request names an adapter, or MODEL for the base alone; requests of all adapters share every step. Adapters
come, change and go while it runs, by the endpoints of vLLM's LoRA server:

    POST /v1/load_lora_adapter    {"lora_name": NAME, "lora_path": FOLDER}; with "load_inplace": true NAME may be there:
                                  it gets the folder's values, and requests in flight go on with the former ones
    POST /v1/unload_lora_adapter  {"lora_name": NAME}; refused while requests use it

Who can reach the port can use these: it listens on this machine alone unless --host says otherwise.
"""

import argparse
import asyncio
import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import jinja2
import pydantic
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    CBStreamer,
    CBWorkerDeadError,
    GenerationState,
    Modality,
    _StreamError,
)

import c3a_triton
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, C3AError

# Each request has its own sampling: a batch does this for what its configuration sets, to whatever value.
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 0.5}
# Of OpenAI's fields: those that change no answer, and what others may say because it is what happens anyway.
IGNORED = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
NEUTRAL = {"n": 1, "best_of": 1, "tool_choice": "auto", "response_format": {"type": "text"}}
# transformers' handlers take these, and nothing of them would reach the batch.
WITHOUT_EFFECT = {"stop", "seed", "frequency_penalty", "logit_bias", "generation_config"}
# What other errors than HTTPException, which says it itself, mean for their request.
STATUS = {
    AdapterNotFoundError: 404,
    AdapterStateError: 409,
    C3AError: 400,
    RequestValidationError: 400,
    KeyError: 400,
    TypeError: 400,
    ValueError: 400,
    jinja2.TemplateError: 400,
    CBWorkerDeadError: 503,
    Exception: 500,
}
KINDS = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError"}


class Served(GenerationState):
    """A model, its adapters, and the batch that all requests are in.

    Args:
        models: transformers' manager of models, with this one as its `force_model`.
        config: how requests are batched.
    """

    def __init__(self, models: ModelManager, config: ContinuousBatchingConfig) -> None:
        super().__init__(continuous_batching=True)
        self.base, self.config = models.force_model, config
        self.model, self.tokenizer = models.load_model_and_processor(models.process_model_name(self.base))
        if models.get_model_modality(self.model, self.tokenizer) is not Modality.LLM:
            raise ValueError(f"{self.base} is no model of text alone, and others cannot be batched")
        self.cards = {self.base: card(self.base, self.base, None)}
        self.batching: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it requests are computed."""
        sampling = copy.deepcopy(self.model.generation_config)
        sampling.update(**SAMPLING)
        with self.model.c3a.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=self.config
        ) as self.batching:
            capacity = self.batching.batch_processor.cache.num_blocks * self.config.page_size
            self.longest = min(capacity, self.model.config.get_text_config().max_position_embeddings)
            for name in self.cards.keys() - {self.base}:
                self.batching.check_adapter(name)
            yield

    def load(self, name: str, folder: str, in_place: bool = False) -> None:
        """Put an adapter onto the model, or other values into one that is there."""
        if name == self.base:
            raise AdapterStateError(f"{name!r} is the model's own name: give the adapter another one")
        if in_place and name in self.cards:
            self.model.c3a.hotswap_adapter(folder, name)
        else:
            c3a_triton.load_adapter(self.model, folder, name)
        if self.batching is not None:
            try:
                self.batching.check_adapter(name)
            except C3AError:
                self.model.c3a.delete_adapter(name)
                raise
        self.cards[name] = card(name, folder, self.base)

    def card_of(self, name: str) -> dict[str, Any]:
        """What /v1/models says of a name that requests may have."""
        if name not in self.cards:
            raise HTTPException(404, f"the model {name!r} does not exist, but these do: {', '.join(self.cards)}")
        return self.cards[name]

    def unload(self, name: str) -> None:
        """Take an adapter away, which no request may use."""
        self.model.c3a.delete_adapter(name)
        del self.cards[name]

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """What generates for a request whose `model` this is."""
        return Generation(self, "__base__" if model_id == self.base else model_id)

    def end(self, request_id: str) -> None:
        """Free what a request holds if it has not come to its end: nobody waits for it any more."""
        if self.batching.output_router.result_handlers.pop(request_id, None) is not None:
            self.batching.cancel_request(request_id)


class Generation(BaseGenerateManager):
    """How transformers' handlers generate here: by a request in the batch, with an adapter."""

    def __init__(self, served: Served, adapter_name: str) -> None:
        self.served, self.adapter_name = served, adapter_name

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, CBStreamer]:
        """A queue of text as it comes, and what fills it."""
        queue: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        streamer = CBStreamer(
            self.served.batching, request_id, processor._tokenizer, loop, queue, response_parser=response_parser
        )

        def deliver(output: Any) -> None:
            try:  # outputs of other requests are delivered behind this one
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(_StreamError(output.error))
                elif output.is_finished():
                    streamer.end()
            except Exception as error:
                queue.put_nowait(_StreamError(str(error)))

        self._add(inputs["input_ids"], gen_config, request_id, deliver, streaming=True)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """The text, the number of the prompt's tokens, and the new tokens."""
        outputs: asyncio.Queue = asyncio.Queue()
        self._add(inputs["input_ids"], gen_config, request_id, outputs.put_nowait)
        output = await outputs.get()
        if output.error is not None:
            raise HTTPException(500, output.error)
        text = processor.decode(output.generated_tokens, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), output.generated_tokens

    def _add(
        self, tokens: list[int], config: GenerationConfig, request_id: str, deliver: Callable, streaming: bool = False
    ) -> None:
        batching, room = self.served.batching, self.served.longest - len(tokens)
        if not tokens or room < 1:
            raise ValueError(f"the prompt has {len(tokens)} tokens, and must have 1 to {self.served.longest - 1}")
        if config.max_new_tokens < 1:
            raise ValueError(f"max_tokens is {config.max_new_tokens}, and must be at least 1")
        config.max_new_tokens = min(config.max_new_tokens, room)  # the handler's finish_reason goes by it
        own_sampling = sampling(config, self.served.model.config.get_text_config().vocab_size)
        batching.register_result_handler(request_id, deliver)
        added = batching.add_request(
            tokens,
            request_id=request_id,
            adapter_name=self.adapter_name,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=config.eos_token_id,
            streaming=streaming,
            **own_sampling,
        )
        if added is None:
            raise CBWorkerDeadError(f"nothing is computed any more: {batching.background_thread_status.fatal_error}")

    def stop(self) -> None:
        """The batch is not this request's to stop."""


def sampling(config: GenerationConfig, vocabulary: int) -> dict[str, Any]:
    """A request's own sampling. The greedy choice is that among the one best token."""
    if not config.do_sample:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    temperature, top_p = (1.0 if value is None else value for value in (config.temperature, config.top_p))
    if not (0 < temperature < float("inf") and 0 < top_p <= 1):
        raise ValueError(f"temperature is {temperature} and must be at least 0, top_p is {top_p} and must be in (0, 1]")
    return {"temperature": temperature, "top_k": config.top_k or vocabulary, "top_p": top_p}


class OfAdapters(BaseHandler):
    """What transformers' handlers do otherwise where `model` names an adapter."""

    required: str
    generation_state: Served

    def _validate_request(self, body: dict[str, Any]) -> None:
        if not body.get(self.required):
            raise ValueError(f"the request has no {self.required}")
        unknown = body.keys() - self._valid_params_class.__mutable_keys__
        refused = (unknown | self._unused_fields | WITHOUT_EFFECT) - IGNORED
        if found := [field for field in body if field in refused and body[field] and body[field] != NEUTRAL.get(field)]:
            raise ValueError(f"this server does not know what to do with {', '.join(found)}")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served, name = self.generation_state, body.get("model")
        if not name:
            raise ValueError("the request has no model")
        served.card_of(name)
        return name, served.model, served.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)
        if any(body.get(field) is not None for field in ("temperature", "top_p")):
            config.do_sample = config.temperature != 0
        return config


class Completions(OfAdapters, CompletionHandler):
    """/v1/completions"""

    required = "prompt"


class ChatCompletions(OfAdapters, ChatCompletionHandler):
    """/v1/chat/completions"""

    required = "messages"


class Load(pydantic.BaseModel):
    """An adapter to be loaded, in vLLM's words."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(pydantic.BaseModel):
    """An adapter to be unloaded."""

    lora_name: str


def application(models: ModelManager, served: Served) -> FastAPI:
    """The server's endpoints."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with served.running():
            yield

    app = FastAPI(title="c3a_triton", lifespan=lifespan)
    completions, chat_completions = Completions(models, served), ChatCompletions(models, served)

    @app.post("/v1/completions")
    async def complete(request: Request, body: dict[str, Any]) -> Response:
        return await answer(completions, served, request, body)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict[str, Any]) -> Response:
        return await answer(chat_completions, served, request, body)

    @app.get("/v1/models")
    async def models_there() -> dict[str, Any]:
        return {"object": "list", "data": list(served.cards.values())}

    @app.get("/v1/models/{name:path}")
    async def model_there(name: str) -> dict[str, Any]:
        return served.card_of(name)

    # In the thread that adds requests, and between two steps of the batch: nobody sees half of an adapter.
    @app.post("/v1/load_lora_adapter")
    async def load(adapter: Load) -> str:
        with served.batching.pause():
            served.load(adapter.lora_name, adapter.lora_path, adapter.load_inplace)
        return f"Success: {adapter.lora_name!r} is loaded."

    @app.post("/v1/unload_lora_adapter")
    async def unload(adapter: Unload) -> str:
        with served.batching.pause():
            served.unload(adapter.lora_name)
        return f"Success: {adapter.lora_name!r} is unloaded."

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if served.batching.is_running() else 503)

    for kind in (HTTPException, *STATUS):
        app.add_exception_handler(kind, failed)
    return app


async def answer(handler: OfAdapters, served: Served, request: Request, body: dict[str, Any]) -> Response:
    """A handler's answer, unless the client leaves before it is there; whenever it leaves, its request ends."""
    request_id = f"req-{uuid.uuid4().hex}"
    working = asyncio.ensure_future(handler.handle_request(body, request_id))
    leaving = asyncio.ensure_future(request.receive())  # behind the body nothing comes but this
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not working.done():
        working.cancel()
        served.end(request_id)
        return Response(status_code=499)
    response = working.result()
    if isinstance(response, StreamingResponse):
        response.body_iterator = events(response.body_iterator)
        response.background = BackgroundTask(served.end, request_id)  # also of a stream that never began
    return response


async def events(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """What a handler streams, its error in OpenAI's form, and OpenAI's end."""
    async for part in parts:
        before, found, error = part.partition('data: {"error": "')
        yield before
        if found:  # it comes last, and whatever it says stands there as it is
            message = error.removesuffix('"}\n\n')
            yield f"data: {json.dumps(error_of(message, 500))}\n\n"
    yield "data: [DONE]\n\n"


async def failed(_: Request, error: Exception) -> JSONResponse:
    """An error as the answer."""
    if isinstance(error, HTTPException):
        return JSONResponse(error_of(error.detail, error.status_code), error.status_code)
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    message = f"the request has no {error}" if type(error) is KeyError else str(error)
    if isinstance(error, RequestValidationError):  # without the place in this file, which its text has
        message = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
    return JSONResponse(error_of(message, status), status)


def error_of(message: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's form, its type in vLLM's words."""
    kind = KINDS.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    """What /v1/models says of the model or an adapter."""
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "c3a_triton"}
    return card | {"root": root, "parent": parent}


def named_folder(text: str) -> tuple[str, str]:
    """NAME=FOLDER."""
    name, found, folder = text.partition("=")
    if not (name and found and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def main(argv: Sequence[str] | None = None) -> None:
    """Load everything, then serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a causal language model: its folder, or its name on the hub")
    parser.add_argument(
        "--adapter", type=named_folder, nargs="+", action="extend", required=True, metavar="NAME=FOLDER"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--cb-num-blocks", type=int, help="blocks of the KV cache; default: what fits into memory")
    parser.add_argument("--cb-max-batch-tokens", type=int, help="tokens in one step; default: what fits into memory")
    args = parser.parse_args(argv)

    models = ModelManager(device=args.device, continuous_batching=True, force_model=args.model)
    batches = ContinuousBatchingConfig(
        num_blocks=args.cb_num_blocks, max_batch_tokens=args.cb_max_batch_tokens, per_request_processors=True
    )
    served = Served(models, batches)
    try:
        for name, folder in args.adapter:
            served.load(name, folder)
    except C3AError as error:
        parser.error(f"--adapter {name}={folder}: {error}")
    uvicorn.run(application(models, served), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
