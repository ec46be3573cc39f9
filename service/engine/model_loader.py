"""Load, hold and free the models of an engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import structlog

from budgetformer.errors import CheckpointError
from service.background import Background, DetachedThreads, StillRunningError
from service.engine.device import DeviceLostError
from service.engine.loaded_model import LoadedModel, WarmUpSteps
from service.engine.requests import Reply
from service.ipc.engine_messages import Cancel, Done, Failed, Load, ModelInfo, Unload
from service.process import return_memory

log = structlog.get_logger()

ModelKey: TypeAlias = tuple[str, int]
"""Name and version."""
SETTLE_SECONDS = 1.0
"""Delay before memory is returned after a change of models, so that running work has ended."""


class ModelLoader:
    """The models that an engine has loaded.

    Args:
        load: loads the checkpoint in a folder; see `load_model`.
        check: called with the error of a load; raises `DeviceLostError` if the device is lost.
        changed: called after each change, with the new model, if there is one; also called when
            the device is lost.

    Attributes:
        models: loaded models by name and version.
        warm_up_steps: ladder steps to pack when a model loads.
        device_lost: error with which the device was lost, if it was.
    """

    def __init__(
        self,
        load: Callable[[Path, WarmUpSteps], LoadedModel],
        check: Callable[[Exception], None],
        changed: Callable[[LoadedModel | None], None],
    ) -> None:
        self.models: dict[ModelKey, LoadedModel] = {}
        self.device_lost: DeviceLostError | None = None
        self.warm_up_steps: WarmUpSteps = {}
        self._load_model = load
        self._check = check
        self._changed = changed
        self._loading = asyncio.Lock()
        self._loads: dict[tuple[Reply, int], asyncio.Task[None]] = {}
        self._threads = DetachedThreads()
        self._background = Background()

    @property
    def infos(self) -> list[ModelInfo]:
        """Descriptions of the loaded models."""
        return [model.info for model in self.models.values()]

    def load(self, message: Load, reply: Reply) -> None:
        """Begin to load a model; `reply` is called when this has succeeded or failed."""
        key = reply, message.id
        self._loads[key] = load = self._background.start(self._load(message, reply))
        load.add_done_callback(lambda _: self._loads.pop(key, None))

    def cancel(self, message: Cancel, reply: Reply) -> None:
        """Cancel a load, if the message names one."""
        load = self._loads.get((reply, message.id))
        if load is not None:
            load.cancel()

    def unload(self, message: Unload, reply: Reply) -> None:
        """Unload a model; it is freed once its last request is answered."""
        model = self.models.pop((message.model, message.version), None)
        if model is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
        else:
            model.network.stop_sharing()
            self._changed(None)
            reply(Done(message.id))
            self._background.start(self._return_memory())

    def stop_sharing(self) -> None:
        """Remove this engine's files from the folder of shared weights, before the engine ends."""
        for model in self.models.values():
            model.network.stop_sharing()

    async def _load(self, message: Load, reply: Reply) -> None:
        path = Path(message.path)
        read = partial(self._load_model, path, self.warm_up_steps)

        def discard(late: LoadedModel) -> None:
            late.network.stop_sharing()

        try:
            async with self._loading:  # one load at a time; a cancelled one does not block others
                model = await self._threads.run(path, read, discard=discard)
        except asyncio.CancelledError:
            log.error("model load timed out", path=message.path)
            raise
        except StillRunningError:
            reply(Failed(message.id, f"{path}: an earlier load of it has not ended yet"))
            return
        except CheckpointError as error:
            reply(Failed(message.id, str(error)))
            return
        except Exception as error:  # any error must be answered
            log.error("model load failed", path=message.path, exc_info=error)
            reply(Failed(message.id, f"{message.path}: {type(error).__name__}"))
            try:
                await self._threads.run(self._check, partial(self._check, error))
            except DeviceLostError as lost:
                self.device_lost = lost
                self._changed(None)
            return
        self.models[model.key] = model
        self._changed(model)
        reply(Done(message.id))
        self._background.start(self._return_memory())

    async def _return_memory(self) -> None:
        """Return memory that a change of models has freed to the system."""
        await asyncio.sleep(SETTLE_SECONDS)
        with contextlib.suppress(StillRunningError, RuntimeError):  # no thread could be started
            await self._threads.run(return_memory, return_memory)
