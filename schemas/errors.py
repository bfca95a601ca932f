"""Every error that Spectrograph raises on purpose.

SpectrographError
+-- ComponentError          a component's name that means nothing, or that the store does not hold   (ValueError)
+-- SelectionError          an image, batch or layer asked for that is not there                     (LookupError)
+-- ModelError              a model that cannot be loaded                                            (ValueError)
|   +-- UnsupportedModelError   one that loads, but that no exact decomposition is known for
+-- SourceError             images, or facts about them, that cannot be read as a whole              (ValueError)
+-- PlanError               an ingest that could not end well, found before it starts                (ValueError)
+-- PrecisionError          a number that does not fit the type it is stored in                      (ArithmeticError)
+-- StoreError              anything about a store on disk                                           (OSError)
    +-- NotAStoreError          no store, or one of another format, is there
    +-- StoreMismatchError      a store made with another model, recipe or source
    +-- BusyStoreError          another process is writing to it
    +-- DamagedStoreError       something recorded is missing, changed or cut short
    +-- StoreWriteError         the disk refused

Each message is one sentence that names the value, and a way out where there is one.
"""


class SpectrographError(Exception):
    """The root: what a caller catches, and what the command line prints without a traceback."""


class ComponentError(SpectrographError, ValueError):
    """A component's name that means nothing, or that the store does not hold."""


class SelectionError(SpectrographError, LookupError):
    """An image, batch or layer asked for that is not there."""


class ModelError(SpectrographError, ValueError):
    """A model that cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model that loads, but that no exact decomposition is known for."""


class SourceError(SpectrographError, ValueError):
    """Images, or facts about them, that cannot be read as a whole."""


class PlanError(SpectrographError, ValueError):
    """An ingest that could not end well, found before it starts."""


class PrecisionError(SpectrographError, ArithmeticError):
    """A number that does not fit the type it is stored in."""


class StoreError(SpectrographError, OSError):
    """Anything about a store on disk."""


class NotAStoreError(StoreError):
    """No store, or one of another format, is at the path."""


class StoreMismatchError(StoreError):
    """A store, or a batch of one, made with another model, recipe or source."""


class BusyStoreError(StoreError):
    """Another process is writing to the store."""


class DamagedStoreError(StoreError):
    """Something that a store records as written is missing, changed or cut short."""


class StoreWriteError(StoreError):
    """The disk refused: full, read-only, or not allowed."""
