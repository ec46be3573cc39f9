from tests.support.command_line import command
from tests.support.stores import model_store

__all__ = ["command", "model_store"]
