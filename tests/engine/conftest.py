"""Tiny models made on the spot, adapters made by PEFT, and engines that serve them."""

import json
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from worker.engine.app import create_app
from worker.engine.engine import Engine, EngineSettings, open_engine
from worker.engine.generation import Failure, Generation, Step
from worker.engine.runner import ModelRunner, Row, load_runner
from worker.engine.schema import ChatRequest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after three special ones: every character that is not ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def save_model(model: Qwen3ForCausalLM, path: Path) -> Path:
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    (path / "generation_config.json").unlink()
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with grouped-query attention; large initial weights, so that its choices are clear-cut."""
    config = Qwen3Config(
        vocab_size=259, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(Qwen3ForCausalLM(config), tmp_path_factory.mktemp("model") / "tiny-qwen3")


@pytest.fixture(scope="session")
def chain_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a model that always answers one text, whose bytes all differ, and then ends its turn.

    It is a Markov chain in weights: embeddings are one-hot, the layer adds nothing, and the head maps each byte to its
    successor.
    """

    def make(text: str) -> Path:
        tokenizer = byte_tokenizer()
        end = tokenizer.eos_token_id
        size = 264
        config = Qwen3Config(
            vocab_size=259, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=False,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
        chain = [*tokenizer("\n" + text)["input_ids"], end]
        assert len(set(chain)) == len(chain), "every byte of the text must have one successor"
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.eye(259, size))
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for token, successor in pairwise(chain):
                model.lm_head.weight[successor, token] = 1.0
        return save_model(model, tmp_path_factory.mktemp("chain") / "model")

    return make


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT 0.21 asks Transformers 5.23 for a property under its deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


@dataclass
class Reference:
    """The same model in bare Transformers: what the engine is compared with."""

    path: Path
    tokenizer: Any

    @cached_property
    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def model(self, adapter: Path | None = None) -> Any:
        if adapter is None:
            return self.base
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        with peft_warnings_ignored():
            return PeftModel.from_pretrained(base, adapter).eval()

    def prompt(self, content: str) -> list[int]:
        ids: list[int] = self.tokenizer(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        return ids

    def greedy(self, content: str, count: int, adapter: Path | None = None) -> list[int]:
        """`count` tokens of Transformers' own generate, the end token ignored."""
        prompt = torch.tensor([self.prompt(content)])
        output = self.model(adapter).generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            min_new_tokens=count, max_new_tokens=count, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        new: list[int] = output[0, prompt.shape[1] :].tolist()
        return new

    @torch.no_grad()
    def logprobs(self, prompt: list[int], answer: list[int], adapter: Path | None = None) -> torch.Tensor:
        """Log-softmax (answer, V) at the positions that predict the answer, by one plain forward."""
        logits = self.model(adapter)(input_ids=torch.tensor([prompt + answer])).logits[0]
        return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir, AutoTokenizer.from_pretrained(model_dir))


@pytest.fixture
def adapters_root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


@pytest.fixture
def make_adapter(model_dir: Path, adapters_root: Path) -> Callable[..., Path]:
    """Writes a PEFT directory below the adapters root; keyword arguments go to LoraConfig."""

    def make(name: str, *, seed: int = 0, size: float = 0.3, **options: Any) -> Path:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
        with peft_warnings_ignored():
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(adapters_root / name)
        return adapters_root / name

    return make


@pytest.fixture
def start_engine(adapters_root: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines on a model directory; keyword arguments go to EngineSettings."""
    engines: list[Engine] = []

    def start(model: Path, **options: Any) -> Engine:
        options = {"device": "cpu", "max_lora_rank": 8} | options
        engine = open_engine(
            EngineSettings(model=model, served_model_name="base", adapters_root=adapters_root, **options)
        )
        engine.start()
        engines.append(engine)
        return engine

    yield start
    survived = [engine.loop.alive for engine in engines]
    for engine in engines:
        engine.close()
    assert all(survived), "a decoding loop has died"


@pytest.fixture
def engine(start_engine: Callable[..., Engine], model_dir: Path) -> Engine:
    return start_engine(model_dir, max_model_len=512)


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine)) as client:
        yield client


@pytest.fixture
def ask() -> Callable[..., dict[str, Any]]:
    """Asks for a greedy answer with token ids and log-probabilities; keyword arguments override the body."""

    def ask(client: Any, content: str = "hello", **fields: Any) -> dict[str, Any]:
        body = {
            "model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0,
            "ignore_eos": True, "logprobs": True, "return_token_ids": True,
        }  # fmt: skip
        response = client.post("/v1/chat/completions", json=body | fields)
        assert response.status_code == 200, response.text
        return response.json()

    return ask


@pytest.fixture
def read_stream() -> Callable[[str], list[dict[str, Any]]]:
    """The chunks of a streamed body, which must end with [DONE]."""

    def read(text: str) -> list[dict[str, Any]]:
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    return read


@pytest.fixture
def serve() -> Iterator[Callable[[Engine], str]]:
    """Serves an engine over real HTTP from a thread; returns the URL."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    class Announcing(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            self.ready = threading.Event()

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.ready.set()

    def start(engine: Engine) -> str:
        config = uvicorn.Config(create_app(engine), port=0, log_level="warning", lifespan="off")
        server = Announcing(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert server.ready.wait(10)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@dataclass(frozen=True)
class Running:
    """A generation started without HTTP; its steps can be awaited one by one."""

    generation: Generation
    events: "queue.SimpleQueue[Step | Failure]"

    def next(self) -> Step:
        event = self.events.get(timeout=30)
        if isinstance(event, Failure):
            raise event.error
        return event

    def rest(self) -> list[Step]:
        steps = [self.next()]
        while steps[-1].finish_reason is None:
            steps.append(self.next())
        return steps

    def tokens(self) -> list[int]:
        return [step.token_id for step in self.rest()]


@pytest.fixture
def submit() -> Callable[..., Running]:
    """Starts a greedy generation on an engine; keyword arguments override the request.

    `seen` is called on the decoding thread, once for each token.
    """

    def submit(
        engine: Engine, content: str = "hello", seen: Callable[[], None] = lambda: None, **fields: Any
    ) -> Running:
        body = {
            "model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 20, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        events: queue.SimpleQueue[Step | Failure] = queue.SimpleQueue()

        def sink(event: Step | Failure) -> None:
            seen()
            events.put(event)

        return Running(engine.submit(ChatRequest.model_validate(body | fields), sink), events)

    return submit


class FailingRunner:
    """The real runner, except that forward number `at` raises `error`."""

    def __init__(self, runner: ModelRunner, at: int, error: Exception) -> None:
        self._runner, self._left, self._error = runner, at, error
        self.cache, self.device = runner.cache, runner.device
        self.shapes, self.max_model_len = runner.shapes, runner.max_model_len

    def forward(self, first_slot: int, rows: Sequence[Row]) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._runner.forward(first_slot, rows)


@pytest.fixture
def failing() -> Callable[[ModelRunner, int, Exception], Any]:
    """Makes a runner fail at its n-th forward."""
    return FailingRunner


@pytest.fixture
def runner(model_dir: Path) -> ModelRunner:
    return load_runner(model_dir, device="cpu", dtype="auto", slots=4, max_model_len=None)[0]
