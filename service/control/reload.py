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
    """Read the settings of a server again, and apply those that may change while it runs.

    Args:
        hub: the hub, which sends the settings to all processes.
        given: settings as they were read at the start; the settings in force differ by resolved
            values, such as a free port.
        read: reads the settings again from the same sources; raises BudgetFormerError.
    """

    def __init__(self, hub: Hub, given: Settings, read: Callable[[], Settings]) -> None:
        self._hub = hub
        self._given = given
        self._read = read
        self._reloading = asyncio.Lock()

    async def __call__(self) -> SettingsReloaded:
        """Read the settings, send them to all processes, and wait until these apply them.

        After `SETTINGS_PATIENCE` the answer names the processes that have not applied them yet.
        Certificates are read again even if the names of their files are the same.

        Raises:
            BudgetFormerError: the settings are invalid, and nothing has changed.
        """
        async with self._reloading:
            try:
                now = self._read()
                changed, fixed = self._given.differences(now)
                change = {name: getattr(now, name) for name in changed}
                settings = _checked(self._hub.settings.model_copy(update=change))
            except BudgetFormerError as error:
                log.error("settings not reloaded", reason=str(error))
                raise
            self._given = self._given.model_copy(update=change)
            set_log_level(settings.log_level)
            waiting = await self._hub.configure(settings)
        write = log.warning if fixed or waiting else log.info
        write("settings reloaded", changed=changed, needs_restart=fixed, waiting_for=waiting)
        return SettingsReloaded(0, changed, fixed, waiting)

    async def quietly(self) -> None:
        """Reload the settings; log errors instead of raising them."""
        try:
            await self()
        except BudgetFormerError:
            return  # already logged
        except Exception as error:  # the server goes on with the settings that it has
            log.error("settings not reloaded", exc_info=error)


def _checked(settings: Settings) -> Settings:
    """Return settings as every process will decode them.

    Raises:
        BudgetFormerError: settings that are valid by themselves do not fit together.
    """
    try:
        checked = decode_settings(encode_settings(settings))
    except ValidationError as error:
        raise SettingsError(first_problem(error)) from None
    checked.check_access()
    return checked
