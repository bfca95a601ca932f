"""Spectrograph: what each part of a CLIP image encoder adds to the representation of each image.

store = spectrograph.open("STORE")
store.images()                                  # an Arrow table
store.heads(layer=5, head=2)                    # (images, dim)
store.contribution("mlp:4", view="reference")   # as the papers define it
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schemas.components import parse as component
    from schemas.errors import SpectrographError
    from services.store import Store
    from services.store import open_store as open

__all__ = ["SpectrographError", "Store", "component", "open"]

_HOMES = {
    "SpectrographError": ("schemas.errors", "SpectrographError"),
    "Store": ("services.store", "Store"),
    "component": ("schemas.components", "parse"),
    "open": ("services.store", "open_store"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that the import itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spectrograph' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
