from tests.support.stores import model_store

__all__ = ["model_store"]
