"""Numbers of bytes, for people."""


def human(size: float) -> str:
    """A size in the unit that suits it: ``17 bytes``, ``5.26 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
