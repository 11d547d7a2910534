"""The engine: sequences in, tokens out, one synchronous step at a time. Ids only: no text, no jobs, no device."""

from worker.engine.engine import Engine, EngineSettings, Token
from worker.engine.sequence import FinishReason, Sequence

__all__ = ["Engine", "EngineSettings", "FinishReason", "Sequence", "Token"]
