"""Read the settings of a running server again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from budgetformer.errors import BudgetFormerError
from service.control.hub import Hub
from service.ipc.control_messages import SettingsReloaded
from service.process import decode_settings, encode_settings
from service.settings import Settings, SettingsError, first_problem
from service.telemetry.logs import set_log_level

log = structlog.get_logger()


class Reload:
    """Have a server go by its settings as they are now, as far as they may change.

    Args:
        hub: tells all processes.
        asked: the settings as they were read at the start; those in force differ by what was
            resolved, such as a free port.
        read: reads them again from the same sources; it raises BudgetFormerError.
    """

    def __init__(self, hub: Hub, asked: Settings, read: Callable[[], Settings]) -> None:
        self._hub = hub
        self._asked = asked
        self._read = read
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self) -> SettingsReloaded:
        """Read them, tell all processes, and return when all go by them or time is up.

        Certificates are read again even if the names of their files are the same.

        Raises:
            BudgetFormerError: they are invalid, and nothing has changed.
        """
        async with self._one_at_a_time:
            try:
                now = self._read()
                changed, fixed = self._asked.differences(now)
                change = {name: getattr(now, name) for name in changed}
                settings = _checked(self._hub.settings.model_copy(update=change))
            except BudgetFormerError as error:
                log.error("settings not reloaded", reason=str(error))
                raise
            self._asked = self._asked.model_copy(update=change)
            set_log_level(settings.log_level)
            waiting = await self._hub.configure(settings)
        write = log.warning if fixed or waiting else log.info
        write("settings reloaded", changed=changed, needs_restart=fixed, waiting_for=waiting)
        return SettingsReloaded(0, changed, fixed, waiting)

    async def quietly(self) -> None:
        """Do it for a caller that reads nothing but the log."""
        try:
            await self()
        except BudgetFormerError:
            return  # it is logged
        except Exception as error:  # whatever it is, the server goes on
            log.error("settings not reloaded", exc_info=error)


def _checked(settings: Settings) -> Settings:
    """Return settings as every process will read them.

    Raises:
        BudgetFormerError: they do not fit together, though each of them did where it came from.
    """
    try:
        checked = decode_settings(encode_settings(settings))
    except ValidationError as error:
        raise SettingsError(first_problem(error)) from None
    checked.check_access()
    return checked
