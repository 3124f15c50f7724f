"""What the routes share: the engine, once it is there, and the names and limits of this server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from attrs import define, field

from sagellm.engine.base import EngineState
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.grammar import Grammar
from sagellm.server.config import ServerConfig
from sagellm.server.errors import APIError
from sagellm.server.parsing import form_of
from sagellm.server.sampling import Defaults


@define
class ServerState:
    config: ServerConfig
    make_engine: Callable[[], SageLLMEngine]
    engine: SageLLMEngine | None = None
    error: str = ""
    """Why no engine can be had."""
    draining: bool = False
    defaults: Defaults = field(factory=Defaults)
    created: int = field(factory=lambda: int(time.time()))
    open_streams: int = 0
    _compiling: ThreadPoolExecutor = field(factory=lambda: ThreadPoolExecutor(1, "grammars"))

    async def load(self) -> None:
        """Make the engine, in a thread, as it takes seconds."""
        try:
            engine = await asyncio.to_thread(self.make_engine)
        except UserError as error:
            self.error = str(error)
            raise
        self._take(engine)

    @classmethod
    def over(cls, engine: SageLLMEngine, config: ServerConfig) -> ServerState:
        """Of an engine that is there."""
        state = cls(config, lambda: engine)
        state._take(engine)
        return state

    def _take(self, engine: SageLLMEngine) -> None:
        self.defaults = Defaults.of(engine.front.link.info.folder)
        self.engine = engine

    @property
    def trouble(self) -> str:
        """Why requests cannot be taken now; empty if they can."""
        if self.draining:
            return "the server is shutting down"
        if self.engine is None:
            return self.error or "the model is being loaded"
        state = self.engine.state
        return "" if state is EngineState.READY else self.engine.front.error or f"the engine is {state.value}"

    def ready(self) -> SageLLMEngine:
        if self.engine is None or self.trouble:
            raise APIError(503, self.trouble, code="not_ready")
        return self.engine

    @property
    def model_name(self) -> str:
        if self.config.served_model_name is not None:
            return self.config.served_model_name
        return self.engine.model_id if self.engine is not None else ""

    @property
    def tool_form(self) -> str | None:
        """How the model marks calls of tools."""
        return self.config.tool_call_parser or form_of(self.tokenizer().chat_template)

    def serving(self, model: str | None) -> SageLLMEngine:
        """The engine, for a request that names this model."""
        engine = self.ready()
        if model is not None and model != self.model_name:
            raise APIError(
                404,
                f"the model {model!r} does not exist; accepted: {self.model_name!r}",
                param="model",
                code="model_not_found",
            )
        return engine

    def tokenizer(self) -> Tokenizer:
        tokenizer = self.ready().tokenizer
        if tokenizer is None:
            raise APIError(400, f"the model {self.model_name!r} has no tokenizer; accepted: token ids")
        return tokenizer

    async def check(self, grammar: Grammar, param: str) -> None:
        """That the engine can follow it. Compiling takes a thread, one at a time; the engine's steps go on."""
        engine = self.ready()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._compiling, engine.check_grammar, grammar)
        except UserError as error:
            raise APIError(400, f"{param}: {error}", param=param) from error

    async def drain(self) -> None:
        """Take nothing new; wait for open requests, up to the limit; then end the engine."""
        self.draining = True
        if self.engine is not None:
            await self.engine.stop(self.config.drain_seconds)
